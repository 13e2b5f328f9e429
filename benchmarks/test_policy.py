"""Speed of the policy losses and their gradients, ours and in eager PyTorch: pytest benchmarks/test_policy.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.parts.policy import SHAPE, check_equal
from benchmarks.timing.memory import settle_allocator
from benchmarks.variants.objectives import pairs
from benchmarks.variants.policy import make_inputs, variants

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time(benchmark: BenchmarkFixture, group: str, run: Callable[[], Any]) -> None:
    def call() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.pedantic(call, rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("name", ["ours", "ours_weighted", "ours_directly", "eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_policy_loss_speed(benchmark: BenchmarkFixture, dtype: torch.dtype, name: str) -> None:
    settle_allocator(DEVICE)
    inputs = make_inputs(SHAPE, dtype, DEVICE)
    check_equal(inputs)
    run = next(v.run for v in variants(inputs, compiled=name == "compiled") if v.name == name)
    time(benchmark, f"policy loss, batch {SHAPE[0]}, {dtype}", run)


@pytest.mark.parametrize("side", ["ours", "eager"])
@pytest.mark.parametrize("objective", ["sampling", "location", "kl", "guard", "nft", "matching"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_objective_speed(benchmark: BenchmarkFixture, dtype: torch.dtype, objective: str, side: str) -> None:
    settle_allocator(DEVICE)
    ours, eager = pairs(make_inputs(SHAPE, dtype, DEVICE))[objective]
    for got, expected in zip(ours(), eager(), strict=True):
        error = float((got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-2))
        assert error <= (1e-4 if dtype == torch.float32 else 1e-2), f"our results and the eager ones differ by {error}"
    time(benchmark, f"{objective}, batch {SHAPE[0]}, {dtype}", ours if side == "ours" else eager)
