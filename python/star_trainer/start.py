"""Starts the commands. Without the packages of the extra ``train``, one message says what to install."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

PACKAGES = ("accelerate", "diffusers", "jsonargparse", "peft", "safetensors", "tqdm", "transformers", "yaml")


def train() -> None:
    """``star-train``."""
    start("star-train", "star_trainer.command", "entry")


def small() -> None:
    """``star-train-small``."""
    start("star-train-small", "star_trainer.small.command", "main")


def start(command: str, module: str, function: str) -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        print(f"{command}: error: requires {', '.join(missing)}: pip install 'star-kernels[train]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(getattr(importlib.import_module(module), function)())
