"""Triton's interpreter, and the versions with which it runs."""

from __future__ import annotations

import numpy
import pytest


def require_interpreter() -> None:
    """Skips the module that calls it where the interpreter does not run."""
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(
            "the interpreter of triton 3.6 turns bounds of loops into numbers as numpy 2.4 forbids",
            allow_module_level=True,
        )
