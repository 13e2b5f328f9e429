"""The contract of ``attention``, which every backend keeps."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import TokenSelection, attention, attention_maps, native

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IDS = ["float32", "float16", "bfloat16"]


@dataclass
class Case:
    """Shapes [B, H, Sq, Sk, D] and what is selected; ``positions`` as ``TokenSelection.from_positions`` takes them."""

    shape: tuple[int, int, int, int, int] = (2, 3, 63, 63, 32)
    positions: list = field(default_factory=lambda: [[5, 9, 40], [0]])
    rows: slice | tuple[int, int] | None = None
    masked: str = ""  # "some" keys, "text" keys among them, or "all" keys of the last sequence
    layout: str = "bhsd"
    reduce_heads: bool = True
    scale: float | None = None


CASES = {
    "plain": Case(),
    "one_query_one_key": Case((1, 1, 1, 1, 8), [[0]]),
    "one_key": Case((2, 2, 7, 1, 16), [[0], [0]]),
    "one_query": Case((1, 2, 1, 63, 16), [[62, 0]]),
    "head_dim_8": Case((1, 2, 33, 65, 8), [[64, 1]]),
    "head_dim_40": Case((1, 2, 33, 65, 40), [[64, 1]]),
    "head_dim_96": Case((1, 2, 33, 65, 96), [[64, 1]]),
    "head_dim_128": Case((1, 2, 130, 129, 128), [[128, 127, 0]]),
    "head_dim_odd": Case((1, 2, 19, 21, 13), [[20, 1]]),
    "parallel": Case((2, 4, 300, 300, 32), [list(range(16)), [7, 299]], reduce_heads=True),  # work for two threads
    "thousand": Case((1, 1, 1000, 1000, 24), [[999, 998, 0]], rows=slice(3, 997)),
    "joint_1357": Case((1, 1, 1357, 1357, 64), [[1024, 1030, 1356]], rows=(0, 1024)),
    "cross": Case((2, 3, 100, 37, 32), [[36, 2], [1]]),
    "cross_long": Case((2, 3, 5, 300, 32), [[299, 2], [1]]),
    "bshd": Case(layout="bshd"),
    "bshd_per_head": Case(layout="bshd", reduce_heads=False, rows=(1, 60)),
    "groups": Case(positions=[[[5], [9, 40], [1, 2, 3]], [[], [62], [0, 0]]]),
    "groups_per_head": Case(positions=[[[5], [9, 40]], [[], [62]]], reduce_heads=False),
    "all_slots_empty": Case(positions=[[], []]),
    "one_sequence_empty": Case(positions=[[3], []]),
    "repeated_tokens": Case(positions=[[7, 7, 7], [1, 2, 1]]),
    "forty_tokens": Case(positions=[list(range(40)), list(range(20, 60))]),
    "every_token": Case((1, 2, 40, 35, 16), [list(range(35))]),
    "rows_slice": Case(rows=slice(10, 47)),
    "rows_open_slice": Case(rows=slice(-20, None)),
    "rows_tuple": Case(rows=(61, 2)),
    "one_row": Case(rows=(31, 1), reduce_heads=False),
    "mask_some": Case(masked="some"),
    "mask_selected": Case(masked="text", rows=(1, 50)),
    "mask_all": Case(masked="all", reduce_heads=False),
    "scale": Case(scale=0.5),
    "scale_zero": Case(scale=0.0),
    "scale_negative": Case(scale=-0.3),
}


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    selection: TokenSelection
    key_mask: Tensor | None
    options: dict

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def make(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    batch, heads, queries, keys, width = case.shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, heads, n, width) for n in (queries, keys, keys)]
    if case.layout == "bshd":
        sizes = [(b, s, h, d) for b, h, s, d in sizes]
    tensors = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    selection = TokenSelection.from_positions(case.positions)
    weight = selection.weight * (0.25 + torch.rand(selection.weight.shape, generator=generator))
    weight = weight.masked_fill((selection.index == -1)[:, None], 9.0)  # the weight of an empty slot counts for nothing
    selection = TokenSelection(selection.index, weight).to(device)
    mask = None
    if case.masked:
        mask = torch.rand(batch, keys, generator=generator) < 0.7
        mask[:, 0] = True
        if case.masked == "text":
            mask[0, selection.index[0, :1].long()] = False
        if case.masked == "all":
            mask[-1] = False
        mask = mask.to(device)
    options = {"rows": case.rows, "layout": case.layout, "reduce_heads": case.reduce_heads, "scale": case.scale}
    return Inputs(*tensors, selection, mask, options)


def textbook(
    query: Tensor, key: Tensor, value: Tensor, selection: TokenSelection, key_mask: Tensor | None, options: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, maps and log-sum-exp from a materialised softmax and one weight for each key, in the inputs' dtype."""
    if options["layout"] == "bshd":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    keys, width = key.shape[2:]
    scale = width**-0.5 if options["scale"] is None else options["scale"]
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    attends = torch.ones_like(scores, dtype=torch.bool)
    if key_mask is not None:
        attends = attends & key_mask[:, None, None]
    some = attends.any(dim=-1)
    # Rows without any key get finite scores first, so that no gradient is NaN, and the stated results afterwards.
    scores = scores.masked_fill(~attends, -torch.inf).masked_fill(~some[..., None], 0.0)
    probability = torch.softmax(scores, dim=-1) * some[..., None]
    lse = torch.logsumexp(scores, dim=-1).masked_fill(~some, -torch.inf)
    out = torch.matmul(probability, value)

    batch, groups, slots = selection.weight.shape
    per_key = torch.zeros(batch, groups, keys + 1, dtype=torch.float64, device=query.device)
    for b in range(batch):
        for t in range(slots):
            per_key[b, :, selection.index[b, t]] += selection.weight[b, :, t]  # empty slots land in the last column
    maps = torch.einsum("bhqk,bgk->bghq", probability, per_key[..., :keys].to(query.dtype))
    rows = options["rows"]
    if rows is not None:
        maps = maps[..., rows if isinstance(rows, slice) else slice(rows[0], sum(rows))]
    maps = maps.mean(dim=2) if options["reduce_heads"] else maps
    return (out.transpose(1, 2) if options["layout"] == "bshd" else out), maps, lse


def run(inputs: Inputs, backend: str, tensors: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    result = attention(
        *(tensors or inputs.tensors),
        inputs.selection,
        key_mask=inputs.key_mask,
        return_lse=True,
        backend=backend,
        **inputs.options,
    )
    return tuple(result)


def cotangents(results: tuple[Tensor, ...], wanted: str) -> list[Tensor]:
    """A random gradient for each wanted result; zero where the log-sum-exp is -inf, which has none."""
    generator = torch.Generator().manual_seed(1)
    random = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device) for r in results]
    random[2] = random[2].masked_fill(results[2].detach() == -torch.inf, 0.0)
    # The float32 and float64 variants get the same numbers: those of the narrowest dtype.
    return [g.bfloat16().double() if n in wanted else None for g, n in zip(random, ("out", "maps", "lse"), strict=True)]


def gradients(function: Callable, inputs: Inputs, dtype: torch.dtype, wanted: str) -> list[Tensor]:
    """Gradients in query, key and value of the wanted results of ``function(tensors)``."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in inputs.tensors]
    results = function(tuple(leaves))
    pairs = [(r, g.to(r.dtype)) for r, g in zip(results, cotangents(results, wanted), strict=True) if g is not None]
    grads = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def textbook_of(inputs: Inputs, dtype: torch.dtype) -> Callable:
    return lambda tensors: textbook(*(t.to(dtype) for t in tensors), inputs.selection, inputs.key_mask, inputs.options)


NARROW_CASES = [
    "one_query_one_key",
    "head_dim_8",
    "head_dim_128",
    "head_dim_odd",
    "joint_1357",
    "cross_long",
    "bshd_per_head",
    "groups",
    "forty_tokens",
    "mask_selected",
    "mask_all",
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES] + [(name, dtype) for dtype in DTYPES[1:] for name in NARROW_CASES],
    ids=str,
)
def test_results_are_as_exact_as_pytorch(
    name: str, dtype: torch.dtype, attention_backend: tuple[str, str], assert_as_exact: Callable, poisoned: None
) -> None:
    backend, device = attention_backend
    case = CASES[name]
    inputs = make(case, dtype, device)
    out, maps, lse = run(inputs, backend)
    exact_out, exact_maps, exact_lse = textbook_of(inputs, torch.float64)(inputs.tensors)
    eager_out, _, _ = textbook_of(inputs, dtype)(inputs.tensors)

    assert out.dtype == dtype
    assert maps.dtype == lse.dtype == torch.float32
    assert_as_exact("out", out, eager_out, exact_out, dtype)
    assert maps.shape == exact_maps.shape
    # The inputs count as exact and scores are float32 throughout, so the dtype plays no part, but for PyTorch's 16-bit
    # kernel for CPUs: it sums exponentials that are good to about 2^-14 only, and the sum divides the maps.
    inexact = 0.0 if dtype == torch.float32 else 2.0**-14
    torch.testing.assert_close(maps.double(), exact_maps, rtol=inexact, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5 + inexact)
    if case.masked == "all":
        assert not out[-1].any()
        assert not maps[-1].any()
        assert bool((lse[-1] == -torch.inf).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("masked", ["", "some"])
def test_out_is_at_most_twice_as_far_off_as_fused_attention(
    dtype: torch.dtype, masked: str, attention_backend: tuple[str, str], assert_as_exact: Callable
) -> None:
    backend, device = attention_backend
    inputs = make(Case((2, 3, 257, 193, 64), [[5], [192, 0]], masked=masked), dtype, device)
    mask = None if inputs.key_mask is None else inputs.key_mask[:, None, None]
    exact = F.scaled_dot_product_attention(*(t.double() for t in inputs.tensors), attn_mask=mask)
    pytorch = F.scaled_dot_product_attention(*inputs.tensors, attn_mask=mask)
    assert_as_exact("out", run(inputs, backend)[0], pytorch, exact, dtype)


QUICK = {"one_query_one_key", "head_dim_odd", "bshd_per_head", "groups", "mask_all", "cross", "scale"}
GRADIENT_CASES = [
    "plain",
    "one_query_one_key",
    "one_key",
    "head_dim_128",
    "head_dim_odd",
    "cross",
    "cross_long",
    "bshd_per_head",
    "groups",
    "groups_per_head",
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
def test_gradcheck_of_the_definition(masked: str, reduce_heads: bool) -> None:
    case = Case((2, 2, 5, 4, 3), [[[1, 1], [3]], [[0], []]], slice(1, 4), masked, reduce_heads=reduce_heads)
    inputs = make(case, torch.float64)
    leaves = tuple(t.requires_grad_() for t in inputs.tensors)

    def finite(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, maps, lse = run(inputs, "naive", tensors)
        return out, maps, lse.masked_fill(lse == -torch.inf, 0.0)  # has no numerical derivative

    assert torch.autograd.gradcheck(finite, leaves)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _sliced(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:2], 2 * t.shape[2], t.shape[3] + 5), torch.nan, dtype=t.dtype, device=t.device)
    view = wide[:, :, ::2, 2:-3]
    view.copy_(t)
    return view


def _last_dimension_strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]


def _last_dimension_first(t: Tensor) -> Tensor:
    return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def _expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def _expanded_heads(t: Tensor) -> Tensor:
    return t[:, :1].expand(t.shape)


def _expanded_rows(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :1].expand(t.shape)


def _overlapping(t: Tensor) -> Tensor:
    """Rows that are windows of one sequence, each one element after the last."""
    return torch.nn.functional.pad(t[..., 0], (0, t.shape[3] - 1), value=0.5).unfold(-1, t.shape[3], 1)


EXPANDED = [_expanded, _expanded_heads, _expanded_rows, _overlapping]


@pytest.mark.parametrize(
    "view", [_transposed, _sliced, _last_dimension_strided, _last_dimension_first, *EXPANDED], ids=lambda f: f.__name__
)
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
        # The same arithmetic, but a matrix product may take another order for other strides.
        scale = expected[expected.isfinite()].abs().max()
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(got, expected, rtol=0, atol=float(4 * eps * scale))


def test_heads_of_one_element_in_any_layout(attention_backend: tuple[str, str]) -> None:
    """PyTorch takes [B, H, S, 1] with heads innermost for an image with channels last."""
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
    batch, groups, slots = dense.weight.shape
    index = torch.stack([dense.index, torch.full_like(dense.index, 62)], -1)[..., 0]
    weight = dense.weight.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    inputs.selection = TokenSelection(index, weight)
    inputs.key_mask = torch.stack([inputs.key_mask, ~inputs.key_mask], -1)[..., 0]
    for got, want in zip(run(inputs, backend), expected, strict=True):
        assert torch.equal(got, want)
    assert inputs.selection.weight.shape == (batch, groups, slots)


def test_an_expanded_key_mask_serves_every_sequence(attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(CASES["plain"], torch.float32, device)
    inputs.key_mask = (torch.arange(63, device=device) % 3 != 0)[None].expand(2, -1)
    got = run(inputs, backend)
    inputs.key_mask = inputs.key_mask.contiguous()
    for strided, dense in zip(got, run(inputs, backend), strict=True):
        assert torch.equal(strided, dense)


def test_masked_keys_have_no_influence(attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(CASES["mask_selected"], torch.float32, device)
    expected = run(inputs, backend)
    unseen = ~inputs.key_mask[:, None, :, None]
    huge = (inputs.query, inputs.key + 50 * unseen, inputs.value - 1e4 * unseen)  # a score that would overflow
    for got, want in zip(run(inputs, backend, huge), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shift", [-200.0, 60.0])
def test_large_scores_neither_overflow_nor_vanish(shift: float, attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(CASES["plain"], torch.float32, device)
    column = torch.zeros_like(inputs.key)
    column[..., 0] = shift
    query = inputs.query.clone()
    query[..., 0] = 10.0
    tensors = (query, inputs.key + column, inputs.value)
    _, maps, _ = run(inputs, backend, tensors)
    _, exact, _ = textbook_of(inputs, torch.float64)(tensors)
    # Scores of |s| carry an error of about |s| eps sqrt(D), which is the maps' relative error.
    largest = abs(shift) * 10 / 32**0.5
    torch.testing.assert_close(maps.double(), exact, rtol=largest * 1.2e-7 * 32**0.5, atol=1e-6)


def test_selecting_every_key_gives_ones(attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(Case((1, 2, 40, 35, 16), [list(range(35))]), torch.float32, device)
    inputs.selection = TokenSelection.from_mask(torch.ones(1, 35, dtype=torch.bool)).to(device)
    _, maps, _ = run(inputs, backend)
    torch.testing.assert_close(maps, torch.ones_like(maps), rtol=0, atol=1e-5)


def test_empty_slots_never_reach_the_map(attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(CASES["plain"], torch.float32, device)
    _, expected, _ = run(inputs, backend)
    empty = torch.full((2, 5), -1, dtype=torch.int32, device=device)
    index = torch.cat([empty, inputs.selection.index, empty], dim=1)
    weight = torch.cat(
        [torch.ones(2, 1, 5, device=device), inputs.selection.weight, torch.ones(2, 1, 5, device=device)], 2
    )
    inputs.selection = TokenSelection(index, weight)
    _, maps, _ = run(inputs, backend)
    torch.testing.assert_close(maps, expected, rtol=1e-6, atol=1e-7)


def test_lse_is_none_unless_asked_for(attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    inputs = make(CASES["plain"], torch.float32, device)
    assert attention(*inputs.tensors, inputs.selection, backend=backend).lse is None


def test_auto_agrees_with_the_definition_in_float64() -> None:
    inputs = make(CASES["mask_all"], torch.float64)
    for got, want in zip(run(inputs, "auto"), textbook_of(inputs, torch.float64)(inputs.tensors), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wanted", [("maps",), ("out", "maps", "lse")], ids="-".join)
def test_no_matrix_of_size_s_by_s_is_held(
    wanted: tuple, attention_backend: tuple[str, str], peak_memory: Callable
) -> None:
    backend, device = attention_backend
    if backend == "naive" or device != "cpu":
        pytest.skip("the definition holds it by design; other devices have their own counters")
    length, heads = 2048, 4
    inputs = make(Case((1, heads, length, length, 16), [[5, 9, 2000]], masked="some"), torch.float32, device)
    peak = peak_memory(lambda: gradients(lambda tensors: run(inputs, backend, tensors), inputs, torch.float32, wanted))
    assert peak < heads * length * length * 4 / 4


def _operator_arguments(inputs: Inputs, requires_grad: bool) -> tuple:
    start, length = 2, inputs.query.shape[2] - 2
    tensors = [t.detach().clone().requires_grad_(requires_grad) for t in inputs.tensors]
    return (*tensors, inputs.selection.index, inputs.selection.weight, inputs.key_mask, start, length, 0.3)


@pytest.mark.parametrize(
    ("dtype", "reduce_heads", "masked"),
    mostly_exhaustive(
        itertools.product([torch.float32, torch.bfloat16], [True, False], ["", "some"]),
        [(torch.float32, True, "some"), (torch.bfloat16, False, "")],
    ),
    ids=str,
)
def test_operators_pass_opcheck(
    dtype: torch.dtype, reduce_heads: bool, masked: str, attention_backend: tuple[str, str]
) -> None:
    backend, device = attention_backend
    if backend == "naive":
        pytest.skip("the definition is no operator")
    inputs = make(Case((2, 2, 9, 11, 8), [[1, 2], [0]], masked=masked), dtype, device)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    arguments = (*_operator_arguments(inputs, True), reduce_heads, backend)
    torch.library.opcheck(torch.ops.star_kernels.attention.default, arguments, **tolerance)

    with torch.no_grad():
        arguments = (*_operator_arguments(inputs, False), reduce_heads, backend)
        out, maps, lse = torch.ops.star_kernels.attention(*arguments)
        grads = [torch.randn_like(t) for t in (out, maps, lse)]
        query, key, value, *rest = arguments
        for given in (grads, [grads[0], None, None], [None, grads[1], None], [None, None, grads[2]]):
            torch.library.opcheck(
                torch.ops.star_kernels.attention_backward.default,
                (*given, query, key, value, out, lse, *rest),
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize(
    "view",
    mostly_exhaustive(
        [_transposed, _sliced, _last_dimension_strided, *EXPANDED], lambda view: view in (_sliced, _expanded)
    ),
    ids=lambda f: f.__name__,
)
def test_operators_pass_opcheck_on_strided_inputs(view: Callable, attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    if backend == "naive":
        pytest.skip("the definition is no operator")
    inputs = make(Case((2, 2, 9, 11, 8), [[1, 2], [0]]), torch.float32, device)
    _, _, _, *rest = _operator_arguments(inputs, False)
    tensors = [view(t).detach().requires_grad_() for t in inputs.tensors]
    torch.library.opcheck(torch.ops.star_kernels.attention.default, (*tensors, *rest, True, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_it_does_for_pytorch(dtype: torch.dtype) -> None:
    inputs = make(Case((2, 2, 9, 11, 8), [[1, 2], [0]]), torch.float32)
    query, key, value = inputs.tensors[0], inputs.tensors[1], inputs.tensors[2].to(dtype)  # as behind norms of q and k
    with torch.autocast("cpu", dtype=dtype):
        out, maps, lse = attention(query, key, value, inputs.selection, return_lse=True)
        pytorch = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        again = attention_maps(query, key, lse, inputs.selection)
    assert out.dtype == pytorch.dtype == dtype
    assert maps.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out, pytorch)
    torch.testing.assert_close(maps, again)
    expected = attention(query.to(dtype), key.to(dtype), value, inputs.selection).maps
    torch.testing.assert_close(maps, expected)
    double = [t.double() for t in inputs.tensors]
    with torch.autocast("cpu", dtype=dtype):
        assert attention(*double, inputs.selection).out.dtype == torch.float64


@pytest.mark.parametrize("compiler", mostly_exhaustive(["aot_eager", "inductor"], ["aot_eager"]))
def test_compiles_to_one_graph_and_stays_right_when_selection_and_shape_change(
    compiler: str, attention_backend: tuple[str, str]
) -> None:
    backend, device = attention_backend
    if backend == "naive":
        pytest.skip("the definition is plain PyTorch, with nothing of ours for a compiler to see")

    def loss(query: Tensor, key: Tensor, value: Tensor, selection: TokenSelection) -> Tensor:
        out, maps, lse = attention(query, key, value, selection, rows=(0, 5), return_lse=True, backend=backend)
        return out.square().mean() + (maps * maps).sum() + lse.mean()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    cases = [
        Case((2, 2, 19, 19, 8), [[1, 2], [0]]),
        Case((2, 2, 19, 19, 8), [[3], [11, 7]]),  # other tokens, and another largest position
        Case((2, 2, 19, 19, 8), [[18, 3], [1, 2]]),
        Case((2, 2, 33, 33, 8), [[1, 2], [0]]),  # a second length makes it dynamic
        Case((2, 2, 47, 47, 8), [[1, 2], [0]]),
        Case((2, 2, 51, 51, 8), [[1, 2, 50], [0]]),  # a second number of slots does, too
        Case((2, 2, 21, 21, 8), [[1, 2, 5, 6], [0]]),
        Case((2, 2, 22, 22, 8), [[1, 2, 5, 6, 7], [0]]),
    ]
    for seed, case in enumerate(cases if compiler == "aot_eager" else cases[:2]):  # inductor takes its time
        inputs = make(case, torch.float32, device, seed)
        found = []
        for function in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in inputs.tensors]
            value = function(*leaves, inputs.selection)
            found.append([value, *torch.autograd.grad(value, leaves)])
        for eager, got in zip(*found, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)
    # One graph for the first shape, one with a dynamic length, one with a dynamic number of slots.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_call_still_refuses_an_index_past_the_sequence() -> None:
    inputs = make(Case((1, 2, 9, 9, 8), [[3]]), torch.float32)
    compiled = torch.compile(lambda *arguments: attention(*arguments).maps, fullgraph=True, backend="aot_eager")
    compiled(*inputs.tensors, inputs.selection)
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"9|selection.index"):
        compiled(*inputs.tensors, TokenSelection.from_positions([[9]]))


_SUBPROCESS = """
import sys, torch
from star_kernels import TokenSelection, attention, attention_maps, native
assert native.cpu().isa() == sys.argv[1], native.cpu().isa()
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for slots in (1, 3, 40):
        q, k, v = (torch.randn(2, 3, 61, 40, generator=generator).to(dtype) for _ in range(3))
        index = torch.randint(-1, 61, (2, slots), generator=generator, dtype=torch.int32)
        selection = TokenSelection(index, torch.rand(2, 2, slots, generator=generator))
        mask = torch.rand(2, 61, generator=generator) < 0.8
        for reduce_heads in (True, False):
            options = dict(rows=(3, 51), key_mask=mask, reduce_heads=reduce_heads)
            wide = (t.double() for t in (q, k, v))
            _, exact, lse = attention(*wide, selection, return_lse=True, **options)
            maps = attention_maps(q, k, lse.float(), selection, **options)
            assert maps.dtype == torch.float32
            error = float((maps - exact).abs().max())
            assert error < 1e-5, (dtype, slots, error)
print("done")
"""


@pytest.mark.native
@pytest.mark.parametrize("isa", mostly_exhaustive(["baseline", "avx2", "avx512"], ["baseline"]))
def test_every_instruction_set_that_runs_here_gives_the_same_maps(isa: str) -> None:
    if isa not in native.cpu().runnable_isas().split():
        pytest.skip(f"this processor does not run {isa}")
    done = subprocess.run(
        [sys.executable, "-c", _SUBPROCESS, isa],
        env={**os.environ, "STAR_KERNELS_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"
