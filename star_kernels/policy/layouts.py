"""Memory layouts that the kernels can walk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels.checks import repeats
from star_kernels.policy.arguments import Declaration


def walkable(arguments: Any, declared: Declaration) -> Any:
    """The arguments in memory layouts that the kernels can walk: copies of those that are not."""
    n, channel_dim = declared.n_tensors, arguments.channel_dim
    if channel_dim == 1 or channel_dim == arguments.model_output.ndim - 1:  # a set takes longer
        for t in arguments[:n]:
            if t is not None and not t.is_contiguous():
                break
        else:
            return arguments
    tensors = [
        t if t is None else collapsible(t, channel_dim) if latent else t.contiguous()
        for t, latent in zip(arguments, declared.is_latent, strict=False)
    ]
    return arguments._make((*tensors, *arguments[n:]))


def collapsible(tensor: Tensor, channel_dim: int) -> Tensor:
    """The tensor, copied if its location dimensions do not collapse into one stride."""
    if tensor.is_contiguous() and channel_dim in (1, tensor.ndim - 1):
        return tensor
    expected: int | None = None
    for d in range(tensor.ndim - 1, 0, -1):
        size = tensor.shape[d]
        if d == channel_dim or size == 1:
            continue
        stride = tensor.stride(d)
        if expected is not None and stride != expected:
            return tensor.movedim(channel_dim, 1).contiguous().movedim(1, channel_dim)
        expected = stride * size
    return tensor


def empty_like(tensor: Tensor, channel_dim: int) -> Tensor:
    """Uninitialised memory in the layout of a collapsible latent, or channels first if its elements share memory."""
    if not repeats(tensor):
        return torch.empty_like(tensor)
    channels_first = tensor.movedim(channel_dim, 1)
    return channels_first.new_empty(channels_first.shape).movedim(1, channel_dim)
