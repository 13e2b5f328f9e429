"""The direct path of ``attention``, and maps that are detached from the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CASES, DTYPES, IDS, VIEWS, Case, Inputs, cotangents, last_dimension_strided, make
from torch import Tensor, nn

from star_kernels import TokenSelection, attention, native
from star_kernels.attention import direct, dispatch, ops, vendor
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.tuning import Plan

NODE = "ScaledDotProductFlashAttentionForCpuBackward0"  # PyTorch's own


def run(inputs: Inputs, tensors: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    given = {"key_mask": inputs.key_mask, "return_lse": True, **inputs.options, **options}
    return tuple(attention(*tensors, inputs.selection, **given))


def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each following call takes the direct path."""
    found: list[bool] = []
    original = direct.attention

    def attend(*arguments: Any) -> Any:
        result = original(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(direct, "attention", attend)
    return found


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(
    "name", ["plain", "head_dim_odd", "bshd_per_head", "phrases", "mask_all", "cross", "rows_slice"]
)
def test_the_direct_path_gives_the_bits_of_the_operator(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(CASES[name], dtype)
    by_path = taken(monkeypatch)
    found = run(inputs, inputs.tensors)
    monkeypatch.setattr(direct, "attention", lambda *arguments: None)
    for got, want in zip(found, run(inputs, inputs.tensors), strict=True):
        assert torch.equal(got, want)
    assert by_path == [True]


@pytest.mark.native
def test_what_the_kernels_cannot_read_as_it_is_does_not_take_the_direct_path(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(CASES["mask_some"], torch.float32)
    by_path = taken(monkeypatch)
    weight = inputs.selection.weight
    unusual: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        *((tuple(map(view, inputs.tensors)), {}) for view in VIEWS if view.__name__ not in ("transposed", "sliced")),
        (tuple(torch._neg_view(t) for t in inputs.tensors), {}),
        (tuple(nn.Parameter(t) for t in inputs.tensors), {}),
        (tuple(t.as_subclass(Subclass) for t in inputs.tensors), {}),
        (tuple(t.double() for t in inputs.tensors), {}),
        (inputs.tensors, {"backend": "naive"}),
        (inputs.tensors, {"scale": 1}),
        (inputs.tensors, {"key_mask": inputs.key_mask[:, ::1].t().contiguous().t()}),
    ]
    for tensors, options in unusual:
        run(inputs, tensors, **options)
    inputs.selection = TokenSelection(inputs.selection.index, last_dimension_strided(weight))
    run(inputs, inputs.tensors)
    assert by_path == [False] * (len(unusual) + 1)
    inputs.selection = TokenSelection(inputs.selection.index, weight)
    for ordinary in (inputs.tensors, tuple(map(VIEWS[0], inputs.tensors))):
        run(inputs, ordinary)
    assert by_path[len(unusual) + 1 :] == [True] * 2


class Subclass(Tensor):
    pass


@pytest.mark.native
def test_the_library_refuses_arguments_that_do_not_fit_together() -> None:
    look = native.cpu().attention_kind
    query, key = torch.empty(2, 3, 7, 8), torch.empty(2, 3, 9, 8)
    index, weight = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 1, 4)
    good = [query, key, key, index, weight, torch.ones(2, 9, dtype=torch.bool), 2, 8, 0, 7]
    assert look(*good)
    assert look(*(t.transpose(1, 2) for t in good[:3]), *good[3:6], 1, 8, 0, 7)
    for position, changed in [
        (0, query[:, :2]), (0, query.int()), (1, key[:1]), (2, key[:, :, :8]), (2, key.half()), (2, key[..., :4]),
        (3, index.long()), (3, index[:1]), (3, index[:, :3]), (4, weight[:, 0]),
        (4, weight[:, :0]), (5, torch.ones(2, 7, dtype=torch.bool)), (5, torch.ones(2, 9)), (7, 9), (8, -1), (9, 8),
        (9, 0), (8, 1), (6, 1),
    ]:  # fmt: skip
        bad = list(good)
        bad[position] = changed
        assert not look(*bad), (position, changed)


@pytest.mark.parametrize("masked", ["", "some", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_detached_maps_are_constants_and_change_no_other_result(
    dtype: torch.dtype, masked: str, attention_backend: tuple[str, str]
) -> None:
    backend, device = attention_backend
    inputs = make(Case(masked=masked), dtype, device)
    found = []
    for detach_maps in (False, True):
        leaves = tuple(t.clone().requires_grad_() for t in inputs.tensors)
        out, maps, lse = run(inputs, leaves, detach_maps=detach_maps, backend=backend)
        assert maps.requires_grad == lse.requires_grad == (not detach_maps)
        upstream = cotangents((out, maps, lse), "out")[0].to(dtype)
        found.append([out, maps, lse, *torch.autograd.grad(out, leaves, upstream)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_with_detached_maps_pytorch_differentiates_its_own_operator_in_float32(dtype: torch.dtype) -> None:
    """Its 16-bit backward pass on a CPU takes several times as long as ours."""
    inputs = make(CASES["plain"], dtype)
    leaves = tuple(t.requires_grad_() for t in inputs.tensors)
    assert (run(inputs, leaves, detach_maps=True)[0].grad_fn.name() == NODE) == (dtype == torch.float32)
    assert run(inputs, leaves)[0].grad_fn.name() != NODE


def test_detached_maps_have_no_derivative_in_any_mode(attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(CASES["plain"], torch.float32, device)
    query, *others = inputs.tensors

    def both(query: Tensor) -> Tensor:
        _, maps, lse = run(inputs, (query, *others), detach_maps=True, backend=backend)
        return maps.sum() + lse.sum()

    assert not torch.func.grad(both)(query).any()
    if backend == "naive":
        assert not torch.func.jvp(both, (query,), (query,))[1].any()


def test_detached_maps_in_a_compiled_function() -> None:
    inputs = make(CASES["plain"], torch.float32)
    leaves = tuple(t.requires_grad_() for t in inputs.tensors)

    def attend(*tensors: Tensor) -> tuple[Tensor, ...]:
        return run(inputs, tensors, detach_maps=True)

    found = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    assert [r.requires_grad for r in found] == [True, False, False]
    for got, want in zip(found, attend(*leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.native
@pytest.mark.parametrize(
    ("plan", "own"),
    [(Plan("cudnn", "cudnn"), True), (Plan("efficient", "triton"), False), (Plan("flash", "cudnn"), False)],
)
def test_on_a_gpu_pytorch_differentiates_the_kernel_that_is_planned_for_both_passes(
    plan: Plan, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(kernel: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        called.append(kernel)
        return vendor.forward(query, key, value, None, scale)

    called: list[str] = []
    monkeypatch.setattr(vendor, "cuda_forward", forward)
    monkeypatch.setattr(dispatch, "choose_backend", lambda *kind: "auto")
    monkeypatch.setattr(dispatch, "plan_of_call", lambda *arguments: plan)
    inputs = make(CASES["plain"], torch.float32)
    leaves = tuple(t.requires_grad_() for t in inputs.tensors)
    arguments = MapArguments(inputs.selection.index, inputs.selection.weight, None, 0, 63, 0.2, reduce_heads=True)
    out, maps, lse = direct._on_cuda(*leaves, arguments, "auto", differentiated=True, detach_maps=True)
    assert (out.grad_fn.name() == NODE) == own
    assert called == [plan.forward] * own
    assert not maps.requires_grad
    assert not lse.requires_grad
    for got, want in zip((out, maps, lse), ops.attention(*leaves, *arguments[:-1], "vendor"), strict=True):
        assert torch.equal(got, want)
