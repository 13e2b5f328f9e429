"""Gradients of ``attention`` on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import CASES, DTYPES, IDS, Case, cotangents, gradients, make, run, textbook_of
from tiers import mostly_exhaustive
from torch import Tensor

QUICK = {"one_query_one_key", "head_dim_odd", "bshd_per_head", "phrases", "mask_all", "cross", "scale"}
GRADIENT_CASES = [
    "plain",
    "one_query_one_key",
    "one_key",
    "head_dim_128",
    "head_dim_odd",
    "cross",
    "cross_long",
    "bshd_per_head",
    "phrases",
    "phrases_per_head",
    "all_slots_empty",
    "one_sequence_empty",
    "repeated_tokens",
    "forty_tokens",
    "rows_slice",
    "one_row",
    "mask_selected",
    "mask_all",
    "scale",
    "scale_zero",
    "scale_negative",
]


@pytest.mark.parametrize("wanted", [("out",), ("maps",), ("lse",), ("out", "maps", "lse")], ids="-".join)
@pytest.mark.parametrize("name", mostly_exhaustive(GRADIENT_CASES, QUICK))
def test_float32_gradients_are_as_exact_as_pytorch(
    name: str, wanted: tuple, attention_backend: tuple[str, str], assert_as_exact: Callable, poisoned: None
) -> None:
    _check_gradients(CASES[name], torch.float32, wanted, attention_backend, assert_as_exact)


@pytest.mark.parametrize("wanted", [("out",), ("maps",), ("out", "maps", "lse")], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=IDS[1:])
@pytest.mark.parametrize(
    "name",
    mostly_exhaustive(["plain", "cross", "bshd_per_head", "forty_tokens", "mask_all"], QUICK),
)
def test_16_bit_gradients_are_as_exact_as_pytorch(
    name: str, dtype: torch.dtype, wanted: tuple, attention_backend: tuple[str, str], assert_as_exact: Callable
) -> None:
    _check_gradients(CASES[name], dtype, wanted, attention_backend, assert_as_exact)


def _check_gradients(
    case: Case, dtype: torch.dtype, wanted: tuple, attention_backend: tuple[str, str], assert_as_exact: Callable
) -> None:
    backend, device = attention_backend
    inputs = make(case, dtype, device)
    got = gradients(lambda tensors: run(inputs, backend, tensors), inputs, dtype, wanted)
    eager = gradients(textbook_of(inputs, dtype), inputs, dtype, wanted)
    exact = gradients(textbook_of(inputs, torch.float64), inputs, torch.float64, wanted)
    for name, *grads in zip(("query", "key", "value"), got, eager, exact, strict=True):
        assert grads[0].dtype == dtype
        assert_as_exact(f"gradient of {name}", *grads, dtype)


def test_gradients_of_out_maps_and_lse_add_up(attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(CASES["mask_selected"], torch.float32, device)
    together, *apart = (
        gradients(lambda tensors: run(inputs, backend, tensors), inputs, torch.float32, wanted)
        for wanted in (("out", "maps", "lse"), ("out",), ("maps",), ("lse",))
    )
    for whole, parts in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=1e-5)


def test_only_the_wanted_gradients_are_computed(attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(CASES["plain"], torch.float32, device)
    full = gradients(lambda tensors: run(inputs, backend, tensors), inputs, torch.float32, ("out", "maps"))
    for chosen in range(3):
        leaves = [t.clone().requires_grad_(i == chosen) for i, t in enumerate(inputs.tensors)]
        results = run(inputs, backend, tuple(leaves))
        pairs = zip(results, cotangents(results, ("out", "maps")), strict=True)
        pairs = [(r, g.float()) for r, g in pairs if g is not None and r.requires_grad]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        torch.testing.assert_close(leaves[chosen].grad, full[chosen], rtol=1e-5, atol=1e-6)
        assert [t.grad is None for t in leaves] == [i != chosen for i in range(3)]


@pytest.mark.parametrize("masked", ["", "text", "all"])
@pytest.mark.parametrize("reduce_heads", [True, False])
def test_gradcheck_of_the_reference(masked: str, reduce_heads: bool) -> None:
    case = Case((2, 2, 5, 4, 3), [[[1, 1], [3]], [[0], []]], slice(1, 4), masked, reduce_heads=reduce_heads)
    inputs = make(case, torch.float64)
    leaves = tuple(t.requires_grad_() for t in inputs.tensors)

    def finite(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, maps, lse = run(inputs, "naive", tensors)
        return out, maps, lse.masked_fill(lse == -torch.inf, 0.0)  # -inf has no numerical derivative

    assert torch.autograd.gradcheck(finite, leaves)
