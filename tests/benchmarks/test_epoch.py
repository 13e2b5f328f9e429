"""The benchmark of an epoch runs with the preset as it is."""

from __future__ import annotations

import pytest
import torch

from benchmarks.parts import epoch
from benchmarks.timing.harness import Budget


@pytest.mark.exhaustive
def test_both_methods_are_measured() -> None:
    (case,) = epoch.measure(torch.device("cpu"), None, None, Budget(2, 1.0), extent="quick")
    assert set(case["times"]) == {"plain", "star"}
    assert case["ratios"]["star_memory"]["median"] > 0.5
    assert case["ratios"]["star_over_plain"]["count"] == 2
    assert set(case["added"]) == {"selection", "maps", "weights", "loss"}
    assert case["added"]["maps"]["times"] == 2  # both trained steps
    extra = sum(part["times"] * part["median"] for part in case["added"].values())
    assert case["ratios"]["star_by_parts"]["median"] == pytest.approx(1 + extra / case["times"]["plain"]["median"])
