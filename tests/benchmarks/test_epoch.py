"""The benchmark of an epoch, with the preset of the small model."""

from __future__ import annotations

import pytest
import torch

from benchmarks.parts import epoch
from benchmarks.parts.request import Request
from benchmarks.timing.harness import Budget


@pytest.mark.exhaustive
def test_an_epoch_reports_time_and_memory_with_and_without_star() -> None:
    (case,) = epoch.measure(Request(torch.device("cpu"), None, None, Budget(2, 1.0), "quick"))
    assert set(case["times"]) == {"plain", "star"}
    assert case["ratios"]["star_memory"]["median"] > 0.5
    assert case["ratios"]["star_over_plain"]["count"] == 2
    assert set(case["added"]) == {"selection", "maps", "weights", "loss"}
    assert case["added"]["maps"]["times"] == 2  # both trained steps
    extra = sum(part["times"] * part["median"] for part in case["added"].values())
    assert case["ratios"]["star_by_parts"]["median"] == pytest.approx(1 + extra / case["times"]["plain"]["median"])
