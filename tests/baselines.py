"""Compares measured numbers with committed baselines, which apply to one version of a compiler.

With ``STAR_KERNELS_BASELINES=write`` the measured numbers are written to tests/baselines instead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("baselines")


def compare(name: str, made_by: str, measured: dict[str, int], allowed: float) -> None:
    """Fails if a number exceeds its baseline by more than the allowed fraction. Skips if the compiler has no baseline.

    Args:
        name: name of the file in tests/baselines.
        made_by: the compiler and its version.
        measured: the measured numbers.
        allowed: the allowed increase, as a fraction of the baseline.
    """
    file = FOLDER / f"{name}.json"
    known: dict[str, dict[str, int]] = json.loads(file.read_text()) if file.exists() else {}
    if os.environ.get("STAR_KERNELS_BASELINES") == "write":
        known[made_by] = {**known.get(made_by, {}), **measured}
        file.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        return
    if made_by not in known:
        pytest.skip(f"{file.name} has no baseline for {made_by}")
    expected = known[made_by]
    assert measured.keys() <= expected.keys(), "some numbers have no baseline: set STAR_KERNELS_BASELINES=write"
    worse = {k: f"{expected[k]} -> {v}" for k, v in measured.items() if v > expected[k] * (1 + allowed)}
    assert not worse, f"numbers above the baseline {name} of {made_by}: {worse}"
