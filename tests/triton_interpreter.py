"""Triton's interpreter: the versions with which it runs, and the process that it has for itself.

A kernel belongs to the interpreter if TRITON_INTERPRET was set when it was imported. The tests of a file that need it
are marked ``inner`` and run in a process of their own, which one test of the file starts for each tier.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inner = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the interpreter has for itself")
outer = pytest.mark.skipif(INTERPRETED, reason="this is that process")
TIERS = ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)]


def require_interpreter() -> None:
    """Skips the module that calls it where the interpreter does not run."""
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(
            "the interpreter of triton 3.6 turns bounds of loops into numbers as numpy 2.4 forbids",
            allow_module_level=True,
        )


def run_interpreted(file: str, tier: str) -> None:
    """Runs the inner tests of a file in the interpreter's process; fails with its output unless all of them pass."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", tier, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if run.returncode != 0 or " passed" not in run.stdout:
        pytest.fail(f"{run.stdout}\n{run.stderr}", pytrace=False)
