"""A call of ``F.scaled_dot_product_attention``, computed by :func:`star_kernels.attention` with maps."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.attention import attention
from star_kernels.capture.averages import keeps_heads
from star_kernels.capture.passes import ForwardPass
from star_kernels.capture.transforms import backend_for

MASKED = -1e3  # an additive mask must be 0, or at most this: such keys have probability 0 in float32


def attention_with_maps(
    name: str,
    forward_pass: ForwardPass,
    detach: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output of the attention call of ``name``, and its maps, ``[batch, G, R]`` or ``[batch, G, H, R]``.

    The maps are constants if ``detach``.
    """
    if dropout_p or is_causal:
        raise ValueError(
            f"{name} calls attention with dropout_p={dropout_p}, is_causal={is_causal}: maps need dropout_p=0 and "
            "is_causal=False"
        )
    batch = forward_pass.selection.batch
    if query.shape[0] != batch:
        raise ValueError(
            f"the transformer must be called with a batch of {batch}{forward_pass.expected}, got {query.shape[0]}"
        )
    rows = forward_pass.rows
    if rows is not None and sum(rows) > query.shape[2]:
        raise ValueError(
            f"{name} has {query.shape[2]} queries, which do not include the image rows {rows[0]} to {sum(rows) - 1}: "
            "choose other rows, or leave the module out of blocks"
        )
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    out, maps, _ = attention(
        query,
        key,
        value,
        forward_pass.selection,
        rows=rows,
        key_mask=None if attn_mask is None else _key_mask(name, attn_mask, batch, key.shape[2]),
        scale=scale,
        detach_maps=detach,
        reduce_heads=not keeps_heads(forward_pass, query),
        backend=backend_for(name, query, key, value),
    )
    return out, maps


def _key_mask(name: str, mask: Tensor, batch: int, keys: int) -> Tensor:
    """The mask of an attention call as bool [B, Sk], if it is the same for all heads and queries."""
    given = list(mask.shape)
    if mask.ndim == 2:
        mask = mask[:, None, None]
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] != 1 or mask.shape[3] != keys:
        raise ValueError(
            f"{name} calls attention with a mask of shape {given}; maps need a mask that is the same for all queries, "
            f"[B, 1, 1, Sk] or [B, Sk] with B = {batch}, Sk = {keys}"
        )
    shared = mask[:, 0, 0]  # [B, Sk]
    if mask.shape[1] > 1:
        _assert(mask[:, :, 0] == shared[:, None], f"{name} calls attention with a mask that differs between heads")
    if mask.dtype != torch.bool:
        kept = shared == 0
        good = (kept | (shared <= MASKED)) & kept.any(dim=-1, keepdim=True)
        _assert(
            good,
            f"{name} calls attention with a bias: the values of an additive mask must be 0 or -inf, with at least one "
            "0 for each sample",
        )
        shared = kept
    return shared.expand(batch, keys)


def _assert(condition: Tensor, message: str) -> None:
    """Raises on a CPU; on other devices and in compiled graphs the device asserts, without a host sync."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(condition.all()):
            raise ValueError(message)
    else:
        torch._assert_async(condition.all(), message)
