"""pytest benchmarks/test_attention.py: the ways to get attention with maps, at SD3.5-M's 512² with 8 of its heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.variants.attention import (
    SD35_512,
    TOLERANCES,
    bare_variants,
    definition,
    make_inputs,
    map_error,
    map_variants,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = replace(SD35_512, batch=1, heads=8)
BARE = ("sdpa",)
WITH_MAPS = ("ours", "lse_difference", "augmented_value", "materialised")


@pytest.mark.parametrize("name", [*BARE, *WITH_MAPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_attention_speed(benchmark: BenchmarkFixture, dtype: torch.dtype, name: str) -> None:
    inputs = make_inputs(SHAPE, dtype, DEVICE)
    run = next(v.run for v in [*bare_variants(inputs), *map_variants(inputs)] if v.name == name)
    benchmark.group = f"attention, {SHAPE}, {dtype}"

    def call() -> Any:
        result = run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    result = benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    if name in WITH_MAPS:
        assert map_error(result[1], definition(inputs)) <= TOLERANCES[dtype]
