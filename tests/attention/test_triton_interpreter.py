"""The Triton kernels against their definition, run by Triton's interpreter on a CPU.

A kernel belongs to the interpreter if the variable was set when it was imported, so the tests of this file run in a
process of their own: plain pytest starts one for each test function, and shows its output where it fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from star_kernels.attention import naive

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from star_kernels.attention import triton_backward, triton_forward, triton_maps
    from star_kernels.attention.triton_config import BackwardConfig, Tile

    TILE = Tile(32, 32, 4, 1)
    TALL = Tile(64, 16, 4, 1)  # rows and columns of a tile differ, so that one cannot pass for the other

inner = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the interpreter has for itself")
INNER = [
    "test_results_are_as_exact_as_pytorch",
    "test_gradients_are_as_exact_as_pytorch",
    "test_maps_from_a_log_sum_exp_match_the_definition",
    "test_any_strides_give_the_same_results",
    "test_the_shipped_configurations_give_the_same_results",
    "test_equal_calls_give_equal_bits",
    "test_rows_outside_the_range_write_nothing",
    "test_without_a_selection_there_are_no_maps",
    "test_arrival_counters_are_left_at_zero",
]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("name", INNER)
def test_in_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"{__file__}::{name}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if run.returncode != 0 or " passed" not in run.stdout:
        pytest.fail(f"{run.stdout}\n{run.stderr}", pytrace=False)


@dataclass(frozen=True)
class Case:
    """Shape [B, H, Sq, Sk, D]; T tokens in G groups; ``masked``: "some" keys, or "all" of the last sequence."""

    shape: tuple[int, int, int, int, int] = (1, 2, 63, 63, 32)
    tokens: int = 3
    groups: int = 1
    rows: tuple[int, int] | None = None
    masked: str = ""
    reduce_heads: bool = True
    scale: float = 0.2


CASES = {
    "plain": Case(),
    "one": Case((1, 1, 1, 1, 8), tokens=1),
    "full_tiles": Case((1, 2, 64, 64, 32)),
    "cross": Case((2, 3, 40, 70, 32)),
    "cross_short": Case((1, 2, 130, 5, 32), rows=(1, 128)),
    "head_dim_13": Case((1, 2, 20, 33, 13)),
    "head_dim_40": Case((1, 2, 33, 65, 40)),
    "head_dim_64": Case((1, 2, 33, 65, 64)),
    "head_dim_72": Case((1, 2, 33, 40, 72)),
    "head_dim_128": Case((1, 2, 33, 40, 128)),
    "groups": Case(groups=3, tokens=5),
    "six_groups_of_forty": Case(groups=6, tokens=40, masked="some"),
    "per_head": Case((2, 2, 63, 63, 32), groups=2, reduce_heads=False),
    "rows": Case((2, 3, 100, 40, 32), rows=(37, 30)),
    "one_row": Case((1, 20, 40, 40, 16), rows=(33, 1)),
    "mask_some": Case((2, 2, 63, 63, 32), masked="some"),
    "mask_all": Case((2, 2, 40, 64, 32), groups=2, masked="all", reduce_heads=False),
    "scale_zero": Case(scale=0.0),
    "scale_negative": Case(scale=-0.3),
}


@dataclass
class Inputs:
    tensors: tuple[Tensor, Tensor, Tensor]
    index: Tensor
    weight: Tensor
    key_mask: Tensor | None
    rows: tuple[int, int]
    case: Case

    @property
    def arguments(self) -> tuple:
        """All of naive.attention that follows query, key and value."""
        return self.index, self.weight, self.key_mask, self.rows, self.case.scale, self.case.reduce_heads


def make(case: Case, dtype: torch.dtype) -> Inputs:
    batch, heads, queries, keys, width = case.shape
    tensors = tuple(torch.randn(batch, heads, n, width).to(dtype) for n in (queries, keys, keys))
    index = torch.randint(0, keys, (batch, case.tokens), dtype=torch.int32)  # may repeat
    if case.tokens > 1:
        index[0, 1] = -1
    key_mask = None
    if case.masked:
        key_mask = torch.rand(batch, keys) < 0.7
        key_mask[:, 0] = True
        key_mask[0, index[0, :1].long()] = False  # a selected token among them
        if case.masked == "all":
            key_mask[-1] = False
    weight = 0.1 + torch.rand(batch, case.groups, case.tokens)
    return Inputs(tensors, index, weight, key_mask, case.rows or (0, queries), case)


def eager(query: Tensor, key: Tensor, value: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The definition without its widening: plain PyTorch in the dtype of the inputs."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * inputs.case.scale
    if inputs.key_mask is not None:
        some = inputs.key_mask.any(dim=1)[:, None, None, None]
        scores = scores.masked_fill(~inputs.key_mask[:, None, None], -torch.inf).masked_fill(~some, 0.0)
    probability = torch.softmax(scores, dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    if inputs.key_mask is not None:
        probability, lse = probability * some, lse.masked_fill(~some[..., 0], -torch.inf)
    start, length = inputs.rows
    slots = inputs.index.clamp(min=0).long()[:, None, None].expand(-1, query.shape[1], length, -1)
    selected = probability[:, :, start : start + length].gather(3, slots)
    selected = selected.masked_fill((inputs.index == -1)[:, None, None], 0.0)
    maps = torch.einsum("bhrt,bgt->bghr", selected, inputs.weight.to(query.dtype))
    return torch.matmul(probability, value), maps.mean(dim=2) if inputs.case.reduce_heads else maps, lse


def exact(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return naive.attention(*(t.double() for t in inputs.tensors), *inputs.arguments)


DTYPES = {torch.float32: list(CASES), torch.float16: ["plain", "cross", "head_dim_40", "head_dim_128", "mask_all"]}
CASES_AND_DTYPES = [(name, dtype) for dtype in DTYPES for name in DTYPES[dtype]]


@inner
@pytest.mark.parametrize(("name", "dtype"), CASES_AND_DTYPES, ids=str)
def test_results_are_as_exact_as_pytorch(
    name: str, dtype: torch.dtype, assert_as_exact: Callable, poisoned: None
) -> None:
    inputs = make(CASES[name], dtype)
    out, maps, lse = triton_forward.attention(*inputs.tensors, *inputs.arguments, config=TILE)
    exact_out, exact_maps, exact_lse = exact(inputs)
    assert out.dtype == dtype
    assert maps.dtype == lse.dtype == torch.float32
    assert_as_exact("out", out, eager(*inputs.tensors, inputs)[0], exact_out, dtype)
    torch.testing.assert_close(maps.double(), exact_maps, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    if inputs.case.masked == "all":
        assert not out[-1].any()
        assert not maps[-1].any()
        assert bool((lse[-1] == -torch.inf).all())


ALONE = ["plain", "cross", "head_dim_40", "mask_some", "mask_all"]  # cases that also take one gradient at a time
GRADIENT_CASES = [(*case, "out maps lse") for case in CASES_AND_DTYPES]
GRADIENT_CASES += [
    (*case, wanted) for case in CASES_AND_DTYPES if case[0] in ALONE for wanted in ("out", "maps", "lse")
]


def cotangents(inputs: Inputs, wanted: str) -> list[Tensor | None]:
    """Random gradients of out, maps and lse, exact in every dtype; None where not wanted."""
    results = exact(inputs)
    random = [torch.randn(r.shape).to(inputs.tensors[0].dtype).double() for r in results]
    random[2] = random[2].masked_fill(results[2] == -torch.inf, 0.0)
    return [g if name in wanted else None for g, name in zip(random, ("out", "maps", "lse"), strict=True)]


def autograd(
    function: Callable, inputs: Inputs, dtype: torch.dtype, upstream: list[Tensor | None]
) -> tuple[Tensor, ...]:
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs.tensors]
    pairs = [(r, g.to(r.dtype)) for r, g in zip(function(*leaves), upstream, strict=True) if g is not None]
    grads = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))


def kernel_gradients(inputs: Inputs, upstream: list[Tensor | None], config: BackwardConfig | None) -> tuple:
    dtype = inputs.tensors[0].dtype
    grad_out, grad_maps, grad_lse = (
        None if g is None else g.to(d) for g, d in zip(upstream, (dtype, torch.float32, torch.float32), strict=True)
    )
    out, _, lse = triton_forward.attention(*inputs.tensors, *inputs.arguments, config=TILE)
    return triton_backward.attention_backward(
        grad_out, grad_maps, grad_lse, *inputs.tensors, out, lse, *inputs.arguments, config=config
    )


@inner
@pytest.mark.parametrize(("name", "dtype", "wanted"), GRADIENT_CASES, ids=str)
def test_gradients_are_as_exact_as_pytorch(
    name: str, dtype: torch.dtype, wanted: str, assert_as_exact: Callable, poisoned: None
) -> None:
    inputs = make(CASES[name], dtype)
    upstream = cotangents(inputs, wanted)
    got = kernel_gradients(inputs, upstream, BackwardConfig(TALL, TILE))
    reference = autograd(lambda *tensors: eager(*tensors, inputs), inputs, dtype, upstream)
    truth = autograd(lambda *t: naive.attention(*t, *inputs.arguments), inputs, torch.float64, upstream)
    for tensor, *grads in zip(("query", "key", "value"), got, reference, truth, strict=True):
        assert grads[0].dtype == dtype
        assert_as_exact(f"gradient of {tensor}", *grads, dtype)


@inner
@pytest.mark.parametrize("text_to_image", [False, True], ids=["image_to_text", "text_to_image"])
@pytest.mark.parametrize(("name", "dtype"), CASES_AND_DTYPES, ids=str)
def test_maps_from_a_log_sum_exp_match_the_definition(
    name: str, dtype: torch.dtype, text_to_image: bool, poisoned: None
) -> None:
    case = CASES[name]
    if text_to_image:  # swap the lengths, so that the selected positions and the rows stay in range
        batch, heads, queries, keys, width = case.shape
        case = replace(case, shape=(batch, heads, keys, queries, width), rows=case.rows or (0, queries))
    inputs = make(case, dtype)
    query, key, _ = inputs.tensors
    if text_to_image:
        inputs.index = inputs.index.where(inputs.index < 0, inputs.index % query.shape[2])
    wide = [t.double() for t in inputs.tensors]
    lse = exact_lse(inputs)
    arguments = (inputs.index, inputs.weight, inputs.key_mask, inputs.rows, case.scale, case.reduce_heads)
    got = triton_maps.attention_maps(query, key, lse.float(), *arguments, text_to_image, config=TILE)
    expected = naive.attention_maps(wide[0], wide[1], lse, *arguments, text_to_image)
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=1e-5)


def exact_lse(inputs: Inputs) -> Tensor:
    scores = torch.matmul(inputs.tensors[0].double(), inputs.tensors[1].double().transpose(-1, -2)) * inputs.case.scale
    if inputs.key_mask is not None:
        scores = scores.masked_fill(~inputs.key_mask[:, None, None], -torch.inf)
    return torch.logsumexp(scores, dim=-1)


def _bshd(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _packed(t: Tensor) -> Tensor:
    return torch.stack([t, t], dim=3).flatten(3)[..., : t.shape[3]]


def _strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, dim=3)[..., ::2]


@inner
@pytest.mark.parametrize("change", [_bshd, _packed, _strided])
def test_any_strides_give_the_same_results(change: Callable, poisoned: None) -> None:
    inputs = make(Case((2, 3, 40, 50, 24), groups=2, masked="some"), torch.float32)
    upstream = cotangents(inputs, "out maps lse")
    other = replace(
        inputs,
        tensors=tuple(map(change, inputs.tensors)),
        index=_strided(inputs.index[:, None, None])[:, 0, 0],
        weight=inputs.weight.transpose(1, 2).contiguous().transpose(1, 2),
        key_mask=inputs.key_mask.t().contiguous().t(),
    )
    expected = triton_forward.attention(*inputs.tensors, *inputs.arguments, config=TILE)
    got = triton_forward.attention(*other.tensors, *other.arguments, config=TILE)
    if change is not _strided:
        assert got[0].stride() == torch.empty_like(other.tensors[0]).stride()
    config = BackwardConfig(TILE, TILE)
    expected += kernel_gradients(inputs, upstream, config)
    strided = [g.expand(2, *g.shape)[1] if g.ndim < 4 else _bshd(g) for g in upstream]
    got += kernel_gradients(other, strided, config)
    for one, two in zip(expected, got, strict=True):
        assert torch.equal(one, two)


@inner
@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_shipped_configurations_give_the_same_results(width: int, poisoned: None) -> None:
    inputs = make(Case((1, 2, 140, 133, width), groups=2), torch.float16)
    upstream = cotangents(inputs, "out maps lse")
    expected = triton_forward.attention(*inputs.tensors, *inputs.arguments, config=TILE)
    expected += kernel_gradients(inputs, upstream, BackwardConfig(TILE, TILE))
    got = triton_forward.attention(*inputs.tensors, *inputs.arguments) + kernel_gradients(inputs, upstream, None)
    for one, two in zip(expected, got, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-3)


@inner
@pytest.mark.parametrize("reduce_heads", [True, False])
def test_equal_calls_give_equal_bits(reduce_heads: bool) -> None:
    inputs = make(Case((2, 5, 40, 40, 16), groups=2, tokens=20, reduce_heads=reduce_heads), torch.float32)
    upstream = cotangents(inputs, "out maps lse")
    first, second = (
        triton_forward.attention(*inputs.tensors, *inputs.arguments, config=TILE)
        + kernel_gradients(inputs, upstream, BackwardConfig(TILE, TILE))
        for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@inner
def test_rows_outside_the_range_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles without a row of the range do not even count as arrived, and no map is written twice."""
    inputs = make(Case((1, 3, 128, 40, 16), rows=(33, 20)), torch.float32)
    arrivals = torch.zeros(4, dtype=torch.int32)
    monkeypatch.setattr(triton_maps, "_arrival_counter", lambda device, size: arrivals.fill_(-1000))
    triton_forward.attention(*inputs.tensors, *inputs.arguments, config=TILE)
    assert arrivals.tolist() == [-1000, -997, -1000, -1000]


@inner
def test_without_a_selection_there_are_no_maps() -> None:
    inputs = make(Case((1, 2, 40, 40, 16)), torch.float32)
    with_maps = triton_forward.attention(*inputs.tensors, *inputs.arguments, config=TILE)
    out, maps, lse = triton_forward.attention(*inputs.tensors, None, None, *inputs.arguments[2:], config=TILE)
    assert maps is None
    assert torch.equal(out, with_maps[0])
    assert torch.equal(lse, with_maps[2])


@inner
def test_arrival_counters_are_left_at_zero() -> None:
    for shape in ((2, 3, 40, 40, 16), (4, 2, 100, 20, 16)):
        inputs = make(Case(shape), torch.float32)
        triton_forward.attention(*inputs.tensors, *inputs.arguments, config=TILE)
        counters = list(triton_maps._counters.values())
        assert counters
        assert not any(counter.any() for counter in counters)
