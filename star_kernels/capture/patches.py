"""The grid of latents that are images: ``[B, C, height, width]``, cut into patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from star_kernels.capture.family import Grid


def patch_grid(latent: Any, patch_size: int | Sequence[int]) -> Grid:
    """Rows and columns of the patches of ``hidden_states``.

    Raises:
        ValueError: ``latent`` is not ``[B, C, height, width]``, for example a video.
    """
    if latent.ndim != 4:
        raise ValueError(
            f"hidden_states must be [B, C, height, width] while maps are captured, got {list(latent.shape)}"
        )
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    return latent.shape[2] // height, latent.shape[3] // width
