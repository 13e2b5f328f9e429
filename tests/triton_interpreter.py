"""Runs tests in Triton's interpreter, in a process of its own.

Triton interprets a kernel if TRITON_INTERPRET is set when the kernel is imported. In a test file, the tests that
require the interpreter are marked ``inner``. One ``outer`` test of the file starts a process for them in each tier.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inner = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
outer = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
TIERS = ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)]


def require_interpreter() -> None:
    """Skips the calling test module if the interpreter does not work with the installed versions."""
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(
            "the interpreter of triton 3.6 does not work with numpy 2.4 or newer",
            allow_module_level=True,
        )


def run_interpreted(file: str, tier: str) -> None:
    """Runs the inner tests of a file in the interpreter's process. Fails with its output unless all tests pass."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", tier, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if run.returncode != 0 or " passed" not in run.stdout:
        pytest.fail(f"{run.stdout}\n{run.stderr}", pytrace=False)
