"""The benchmark of an epoch runs with the preset as it is."""

from __future__ import annotations

import epoch_overhead
import torch
from harness import Budget


def test_both_arms_are_timed_and_weighed() -> None:
    (case,) = epoch_overhead.measure(torch.device("cpu"), None, None, Budget(2, 1.0), quick=True)
    assert set(case["times"]) == {"plain", "star"}
    assert case["ratios"]["star_memory"]["median"] > 0.5
    assert case["ratios"]["star_over_plain"]["count"] == 2
