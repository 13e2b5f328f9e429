"""Where the channels of a latent stand: what trainers know and tensors only hint at."""

from __future__ import annotations

from torch import Tensor

_CHANNEL_DIMS = {3: -1, 4: 1, 5: 1}


def channel_dim_of(latent: Tensor, channel_dim: int | None) -> int:
    """The given dimension, or that of the layouts in use: packed [B, S, C], [B, C, H, W] and [B, C, F, H, W]."""
    if channel_dim is not None:
        return channel_dim
    if latent.ndim not in _CHANNEL_DIMS:
        raise ValueError(
            f"model_output must be packed [B, S, C], [B, C, H, W] or [B, C, F, H, W], got {list(latent.shape)}"
        )
    return _CHANNEL_DIMS[latent.ndim]


def check_shape(name: str, latent: Tensor, other: str, like: Tensor) -> None:
    """Two latents of one shape: nothing is broadcast."""
    if latent.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {other}, {list(like.shape)}, got {list(latent.shape)}")


def column(numbers: Tensor, like: Tensor) -> Tensor:
    """``[B]`` or ``[1]``, shaped to broadcast over ``like``."""
    return numbers.view(-1, *[1] * (like.ndim - 1))


def weights_like(weights: Tensor | None, latent: Tensor) -> Tensor | None:
    """Weights of a grid, ``[B, h, w]``, in the row-major order of a packed latent's sequence, ``[B, S]``."""
    return weights.flatten(1) if weights is not None and latent.ndim == 3 and weights.ndim > 2 else weights
