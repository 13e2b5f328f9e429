"""The layouts of latents, maps and weights in trainers: channel dimensions, packed sequences and grids."""

from __future__ import annotations

from torch import Tensor

_CHANNEL_DIMS = {3: -1, 4: 1, 5: 1}
_MAP_LAYOUTS = {2: "bp", 3: "bhw", 4: "bfhw"}


def channel_dim_of(latent: Tensor, channel_dim: int | None) -> int:
    """The given dimension, or that of the usual layouts: packed [B, S, C], [B, C, H, W] and [B, C, F, H, W]."""
    if channel_dim is not None:
        return channel_dim
    if latent.ndim not in _CHANNEL_DIMS:
        raise ValueError(
            f"model_output must be packed [B, S, C], [B, C, H, W] or [B, C, F, H, W], got {list(latent.shape)}"
        )
    return _CHANNEL_DIMS[latent.ndim]


def check_shape(name: str, latent: Tensor, other: str, like: Tensor) -> None:
    """Raises unless two latents have the same shape; there is no broadcasting."""
    if latent.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {other}, {list(like.shape)}, got {list(latent.shape)}")


def column(numbers: Tensor, like: Tensor) -> Tensor:
    """``[B]`` or ``[1]`` reshaped to broadcast over ``like``."""
    return numbers.view(-1, *[1] * (like.ndim - 1))


def weights_like(weights: Tensor | None, latent: Tensor) -> Tensor | None:
    """Weights on a grid, ``[B, h, w]``, flattened to ``[B, S]`` for a packed latent, in row-major order."""
    return weights.flatten(1) if weights is not None and latent.ndim == 3 and weights.ndim > 2 else weights


def map_layout(maps: Tensor) -> str:
    """The ``layout`` for :func:`star_kernels.allocate` of maps [B, P], [B, h, w] or [B, F, h, w]."""
    if maps.ndim not in _MAP_LAYOUTS:
        raise ValueError(f"maps must have shape [B, P], [B, h, w] or [B, F, h, w], got {list(maps.shape)}")
    return _MAP_LAYOUTS[maps.ndim]
