"""pytest benchmarks/test_policy.py: the policy loss with its gradient, ours and Flow-GRPO's arithmetic in PyTorch."""

from __future__ import annotations

import pytest
import torch
from policy_overhead import SHAPE, check_equal, settle_allocator
from policy_variants import make_inputs, variants
from pytest_benchmark.fixture import BenchmarkFixture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["ours", "ours_weighted", "eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_policy_loss_speed(benchmark: BenchmarkFixture, dtype: torch.dtype, name: str) -> None:
    settle_allocator(DEVICE)
    inputs = make_inputs(SHAPE, dtype, DEVICE)
    check_equal(inputs)
    run = next(v.run for v in variants(inputs, compiled=name == "compiled") if v.name == name)

    def call() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"policy loss, batch {SHAPE[0]}, {dtype}"
    benchmark.pedantic(call, rounds=20, warmup_rounds=3)
