"""The Triton kernels for statistics, run by Triton's interpreter on a CPU and compiled ahead of time."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiers import mostly_exhaustive
from triton_interpreter import INTERPRETED, TIERS, inner, outer, require_interpreter, run_interpreted

from star_kernels.attention import naive

require_interpreter()
if INTERPRETED:
    from star_kernels.attention import triton_statistics
    from star_kernels.attention.triton_config import Tile

    TILE = Tile(32, 16, 4, 1)
else:
    from tools.compile_report import NVIDIA, Variant, measure


@outer
@pytest.mark.parametrize("tier", TIERS)
def test_in_the_interpreter(tier: str) -> None:
    run_interpreted(__file__, tier)


CASES = {  # shape [B, H, R, Sk, D], shape of the mask, scale
    "plain": ((2, 2, 63, 70, 32), None, 0.2),
    "one": ((1, 1, 1, 1, 8), None, 0.2),
    "few_keys": ((1, 2, 130, 5, 13), None, -0.3),
    "pairs": ((2, 2, 63, 70, 32), (2, 1, 63, 70), 1.5),
    "of_keys": ((2, 2, 33, 40, 72), (1, 1, 1, 40), 0.2),
    "of_heads": ((1, 3, 20, 100, 16), (1, 3, 20, 100), 0.0),
}
DTYPES = [torch.float32, torch.float16]


@inner
@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_exhaustive(itertools.product(CASES, DTYPES), lambda name, dtype: dtype == torch.float32 or name == "pairs"),
    ids=str,
)
def test_kernels_match_the_reference(name: str, dtype: torch.dtype, poisoned: None) -> None:
    (batch, heads, rows, keys, width), shape, scale = CASES[name]
    query = torch.randn(batch, rows, heads, width).to(dtype).transpose(1, 2)
    key = torch.randn(batch, heads, keys, width).to(dtype)
    mask = None
    if shape is not None:
        mask = (torch.rand(shape) < 0.5).mT.contiguous().mT
        if shape[2] > 1:
            mask[0, :, 3] = False
    wide = query.double(), key.double()
    exact_lse, exact_entropy = naive.rows(*wide, mask, scale)
    lse, entropy = triton_statistics.attention_rows(query, key, mask, scale, config=TILE)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-5)
    exact = naive.columns(*wide, exact_lse, mask, scale)
    for splits in (1, 3):
        sums = triton_statistics.attention_columns(
            query, key, exact_lse.float(), mask, scale, config=TILE, splits=splits
        )
        torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-5)
    lse = torch.full_like(lse, -torch.inf)
    assert not triton_statistics.attention_columns(query, key, lse, mask, scale, config=TILE).any()


VARIANTS = list(itertools.product(("rows", "columns"), () if INTERPRETED else NVIDIA, (64, 128, 256), ("bf16", "fp32")))


@outer
@pytest.mark.parametrize(
    ("kernel", "architecture", "width", "dtype"),
    mostly_exhaustive(VARIANTS, [("rows", "sm_90", 128, "bf16"), ("columns", "sm_90", 64, "bf16")]),
)
def test_no_kernel_spills(kernel: str, architecture: str, width: int, dtype: str) -> None:
    for pairs in (False, True):
        variant = Variant(kernel, architecture, width, dtype, pairs=pairs)
        usage = measure(variant)
        print(variant, usage)
        assert usage.stack == 0
        assert usage.blocks >= 2
        assert usage.shared <= 99 * 1024
