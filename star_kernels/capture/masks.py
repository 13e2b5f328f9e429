"""The mask of an attention call: one of keys for all queries, or one that differs by query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels.capture.backends import Backend

MASKED = -1e3  # an additive mask must be 0, or at most this: such keys have probability 0 in float32


def key_mask(name: str, mask: Tensor, batch: int, keys: int) -> Tensor:
    """A mask [B, 1, 1, Sk] or [B, H, 1, Sk] as bool [B, Sk]; an error if it differs between heads."""
    shared = mask[:, 0, 0]  # [B, Sk]
    if mask.shape[1] > 1 and mask.stride(1):
        _assert(mask[:, :, 0] == shared[:, None], f"{name} calls attention with a mask that differs between heads")
    return _true_or_false(name, shared).expand(batch, keys)


def expanded(name: str, mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A mask with the meaning that it has for ``F.scaled_dot_product_attention``, as [1 or B, 1 or H, 1 or Sq, Sk].

    Args:
        shape: [B, H, Sq, Sk] of the call.
    """
    given = list(mask.shape)
    mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 4 else mask
    if mask.ndim != 4 or any(size not in (1, whole) for size, whole in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"{name} calls attention with a mask of shape {given}, which cannot be expanded to [B, H, Sq, Sk] = "
            f"{list(shape)}"
        )
    if mask.shape[2] > 1 and not mask.stride(2):
        mask = mask[:, :, :1]
    return mask.expand(-1, -1, -1, shape[3])


def of_backend(name: str, backend: Backend, mask: Any, shape: tuple[int, int, int, int]) -> Tensor | None:
    """The mask that a call of diffusers' attention backend applies, with the meaning that it has for PyTorch.

    Backends read the same tensor differently. Maps follow what the backend computes, and so its output.
    """
    batch, keys = shape[0], shape[3]
    if mask is None or backend.mask == "none":  # an error of the backend itself
        return None
    if backend.mask == "flex":
        return _of_flex(name, mask, shape)
    if backend.mask == "xformers" and mask.ndim == 2:
        return expanded(name, mask[:, None, None], shape)
    if backend.mask == "xformers" and mask.dtype == torch.bool:
        raise ValueError(
            f"{name} calls attention with a bool mask of {mask.ndim} dimensions, which diffusers adds to the scores as "
            "0 and 1 if the attention backend is xformers: choose another attention backend"
        )
    if backend.mask in ("sdpa", "xformers"):
        return expanded(name, mask, shape)
    if backend.mask == "unknown" or mask.dtype != torch.bool:
        raise ValueError(
            f"{name} calls attention with a mask of {mask.dtype}, whose meaning for the attention backend "
            f"{backend.name} is unknown: choose another attention backend"
        )
    if mask.ndim > 2:  # queries and heads are reduced to what any of them attends to
        mask = mask.any(dim=tuple(range(1, mask.ndim - 1)))
    mask = mask.expand(batch, keys)
    if backend.mask == "count":
        mask = torch.arange(keys, device=mask.device) < mask.sum(dim=1, keepdim=True)
    return mask[:, None, None]


def _of_flex(name: str, mask: Any, shape: tuple[int, int, int, int]) -> Tensor:
    if isinstance(mask, Tensor):
        if mask.ndim == 2:  # diffusers reads it as a mask of queries
            mask = mask[:, None, :, None]
        return expanded(name, mask, shape)
    from torch.nn.attention.flex_attention import create_mask

    blocks = mask.kv_num_blocks  # [1 or B, 1 or H, ...]: a dimension of 1 does not matter to the mask
    found = create_mask(mask.mask_mod, blocks.shape[0], blocks.shape[1], shape[2], shape[3], blocks.device)
    return expanded(name, found, shape)


def _true_or_false(name: str, mask: Tensor) -> Tensor:
    """An additive mask as bool."""
    if mask.dtype == torch.bool:
        return mask
    kept = mask == 0
    _assert(
        (kept | (mask <= MASKED)) & kept.any(dim=-1, keepdim=True),
        f"{name} calls attention with a bias: the values of an additive mask must be 0 or -inf, with at least one "
        "0 for each sample",
    )
    return kept


def _assert(condition: Tensor, message: str) -> None:
    """Raises on a CPU; on other devices and in compiled graphs the device asserts, without a host sync."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(condition.all()):
            raise ValueError(message)
    else:
        torch._assert_async(condition.all(), message)
