"""Imports optional packages of rewards; the error names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, reward: str) -> ModuleType:
    """The imported module.

    Raises:
        ImportError: it is not installed; the message names the extra that contains it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the reward {reward!r} needs {module} ({error}): pip install 'star-kernels[rewards]'"
        ) from error
