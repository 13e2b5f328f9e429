"""Conversions between tensors, PIL images and image files, and slices of batches."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from star_trainer.rewards.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image


def to_uint8(images: Tensor) -> Tensor:
    """float ``[N, 3, H, W]`` in 0..1 to uint8 ``[N, H, W, 3]``, rounded and clamped as in ddpo and Flow-GRPO."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pil(images: Tensor, reward: str) -> list[Image]:
    """float ``[N, 3, H, W]`` in 0..1 to N RGB images.

    Raises:
        ImportError: pillow is not installed; the message names ``reward``.
    """
    from_array = require("PIL.Image", reward).fromarray
    return [from_array(image) for image in to_uint8(images).numpy()]


def encode(image: Image, file_format: str, **options: int) -> bytes:
    """The bytes of an image file in a format such as "PNG"."""
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def slices(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``range(count)`` in order."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
