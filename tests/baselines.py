"""Measured numbers against committed ones, which hold for one version of a compiler.

``STAR_KERNELS_BASELINES=write`` writes what a test measures into tests/baselines instead of comparing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("baselines")


def compare(name: str, made_by: str, measured: dict[str, int], allowed: float) -> None:
    """Fails where a number exceeds the committed one by more than the allowed share; skips for another compiler."""
    file = FOLDER / f"{name}.json"
    known: dict[str, dict[str, int]] = json.loads(file.read_text()) if file.exists() else {}
    if os.environ.get("STAR_KERNELS_BASELINES") == "write":
        known[made_by] = {**known.get(made_by, {}), **measured}
        file.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        return
    if made_by not in known:
        pytest.skip(f"{file.name} has no numbers for {made_by}")
    expected = known[made_by]
    assert measured.keys() <= expected.keys(), "numbers that have no baseline yet: STAR_KERNELS_BASELINES=write"
    worse = {k: f"{expected[k]} -> {v}" for k, v in measured.items() if v > expected[k] * (1 + allowed)}
    assert not worse, f"above {name} of {made_by}: {worse}"
