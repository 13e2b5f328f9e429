"""DAAM: ``trace`` replaces the cross-attentions of a UNet."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor

MODELS = ("unet",)
PACKAGES = ("torch", "diffusers", "transformers")
KEPT = "sum over steps, for each block, head and token, of the half with the prompt"


@contextmanager
def attach(checkout: str, name: str, model: Any, gradients: bool) -> Iterator[Callable[[], list[Tensor]]]:
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    package = importlib.import_module("daam")
    pipeline = SimpleNamespace(unet=model, vae_scale_factor=8, check_inputs=None)
    with package.trace(pipeline) as tracer:
        yield lambda: [maps for _, maps in tracer.all_heat_maps]
