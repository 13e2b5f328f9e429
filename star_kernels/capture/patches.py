"""The grid of latents that are images: ``[B, C, height, width]``, cut into square patches."""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Grid


def patch_grid(latent: Any, patch_size: int, name: str = "hidden_states") -> Grid:
    """Rows and columns of patches.

    Raises:
        ValueError: ``latent`` is not ``[B, C, height, width]``, for example a video.
    """
    if latent.ndim != 4:
        raise ValueError(f"{name} must be [B, C, height, width] while maps are captured, got {list(latent.shape)}")
    return latent.shape[2] // patch_size, latent.shape[3] // patch_size
