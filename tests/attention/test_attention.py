"""The contract of ``attention``, which every backend fulfils: results, in every dtype and for every kind of input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, DTYPES, IDS, Case, gradients, make, run, textbook_of

from star_kernels import TokenSelection, attention, attention_maps

NARROW_CASES = [
    "one_query_one_key",
    "head_dim_8",
    "head_dim_128",
    "head_dim_odd",
    "joint_1357",
    "cross_long",
    "bshd_per_head",
    "phrases",
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


def test_auto_runs_the_reference_in_float64() -> None:
    inputs = make(CASES["mask_all"], torch.float64)
    for got, want in zip(run(inputs, "auto"), textbook_of(inputs, torch.float64)(inputs.tensors), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wanted", [("maps",), ("out", "maps", "lse")], ids="-".join)
def test_no_matrix_of_size_s_by_s_is_materialised(
    wanted: tuple, attention_backend: tuple[str, str], peak_memory: Callable
) -> None:
    backend, device = attention_backend
    if backend == "naive" or device != "cpu":
        pytest.skip("the reference materialises it by design; only CPU memory is counted")
    length, heads = 2048, 4
    inputs = make(Case((1, heads, length, length, 16), [[5, 9, 2000]], masked="some"), torch.float32, device)
    peak = peak_memory(lambda: gradients(lambda tensors: run(inputs, backend, tensors), inputs, torch.float32, wanted))
    assert peak < heads * length * length * 4 / 4


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
