"""A house style as a reward: images in the colours of a brand.

    PYTHONPATH=examples/recipes star-train --config examples/recipes/house-style.yaml

A template for a reward of your own: a class with a ``name``, which is called with images, prompts and metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class HouseStyle:
    """Similarity of the pixels to the nearest colour of a palette, 0..1. An image of one such colour scores 1.

    Args:
        palette: colours as "#rrggbb".
        tolerance: distance in RGB, with channels in 0..1, from which on the score of a pixel is 0.

    Raises:
        ValueError: an empty palette, a colour in another format, or a tolerance that is not positive.
    """

    name = "house-style"

    def __init__(self, *, palette: Sequence[str], tolerance: float = 0.5) -> None:
        if not palette:
            raise ValueError("palette must name at least one colour, got none")
        if not tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {tolerance}")
        self.palette = torch.tensor([_rgb(color) for color in palette])
        self.tolerance = tolerance

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        pixels = images.flatten(2).transpose(1, 2)  # [N, H*W, 3]
        distance = torch.cdist(pixels, self.palette.expand(len(images), -1, -1)).amin(dim=2)
        return (1 - distance / self.tolerance).clamp(min=0).mean(dim=1)


def _rgb(color: str) -> list[float]:
    digits = color.removeprefix("#")
    if len(color) != 7 or len(digits) != 6 or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
        raise ValueError(f'palette must contain colours as "#rrggbb", got {color!r}')
    return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
