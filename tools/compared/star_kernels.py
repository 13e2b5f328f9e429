"""star_kernels.capture_maps: maps of two phrases of four tokens each, in every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from star_kernels import TokenSelection, capture_maps

MODELS = ("sd3", "unet")
PACKAGES = ("torch", "diffusers")
KEPT = "mean over heads and blocks, for each phrase, of the half with the prompt"


@contextmanager
def attach(checkout: str, name: str, model: Any, gradients: bool) -> Iterator[Callable[[], list[Tensor]]]:
    phrases = torch.eye(2).repeat_interleave(4, dim=1)[None]  # [1, 2, 8]
    selection = TokenSelection(torch.arange(1, 9, dtype=torch.int32)[None], phrases)
    with capture_maps(model, selection, blocks="all", cfg="last", detach=not gradients) as capture:
        yield lambda: [capture.value]
