"""Memory layouts of the inputs of ``attention``, which change neither results nor gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import CASES, EXPANDED, VIEWS, cotangents, make, run

from star_kernels import TokenSelection, attention


@pytest.mark.parametrize("view", VIEWS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides_do_not_change_results_or_gradients(
    view: Callable, dtype: torch.dtype, attention_backend: tuple[str, str]
) -> None:
    backend, device = attention_backend
    inputs = make(CASES["mask_some"], dtype, device)
    strided = [view(t).detach() for t in inputs.tensors]
    dense = [t.contiguous() for t in strided]
    if view not in EXPANDED:
        assert all(torch.equal(t, u) for t, u in zip(dense, inputs.tensors, strict=True))
    found = []
    for tensors in (strided, dense):
        leaves = tuple(t.requires_grad_() for t in tensors)
        results = run(inputs, backend, leaves)
        gradient = cotangents(results, ("out", "maps", "lse"))
        torch.autograd.backward(results, [g.to(r.dtype) for g, r in zip(gradient, results, strict=True)])
        found.append([*(r.detach() for r in results), *(t.grad for t in leaves)])
    for got, expected in zip(*found, strict=True):
        # The same arithmetic, but the order of the sums in a matrix product may depend on strides.
        scale = expected[expected.isfinite()].abs().max()
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(got, expected, rtol=0, atol=float(4 * eps * scale))


def test_heads_of_one_element_in_any_layout(attention_backend: tuple[str, str]) -> None:
    """For PyTorch [B, H, S, 1] with heads innermost is an image with channels last."""
    backend, device = attention_backend
    tensors = [torch.randn(3, 5, 4, 1, device=device) for _ in range(3)]  # [B, S, H, D]
    selection = TokenSelection.from_positions([[2]] * 3).to(device)
    found = []
    for leaves in (tensors, [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in leaves]
        out, maps, lse = attention(*leaves, selection, layout="bshd", return_lse=True, backend=backend)
        loss = out.square().sum() + maps.sum() + lse.square().sum()
        found.append([out, maps, lse, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_strided_selection_and_key_mask(attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(CASES["mask_some"], torch.float32, device)
    expected = run(inputs, backend)
    dense = inputs.selection
    batch, phrases, slots = dense.weight.shape
    index = torch.stack([dense.index, torch.full_like(dense.index, 62)], -1)[..., 0]
    weight = dense.weight.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    inputs.selection = TokenSelection(index, weight)
    inputs.key_mask = torch.stack([inputs.key_mask, ~inputs.key_mask], -1)[..., 0]
    for got, want in zip(run(inputs, backend), expected, strict=True):
        assert torch.equal(got, want)
    assert inputs.selection.weight.shape == (batch, phrases, slots)


def test_an_expanded_key_mask_applies_to_every_sequence(attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(CASES["plain"], torch.float32, device)
    inputs.key_mask = (torch.arange(63, device=device) % 3 != 0)[None].expand(2, -1)
    got = run(inputs, backend)
    inputs.key_mask = inputs.key_mask.contiguous()
    for strided, dense in zip(got, run(inputs, backend), strict=True):
        assert torch.equal(strided, dense)
