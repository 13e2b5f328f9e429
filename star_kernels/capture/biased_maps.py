"""Maps of attention with a bias that differs by query, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from star_kernels.attention.checks import autocasted, resolve_scale
from star_kernels.selection import EMPTY, TokenSelection

CHUNK_BYTES = 64 << 20  # of the scores that are held at once


def biased_maps(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    selection: TokenSelection,
    *,
    rows: tuple[int, int],
    scale: float | None = None,
    reduce_heads: bool = True,
) -> Tensor:
    """The maps of :func:`star_kernels.attention` with a bias [1 or B, 1 or H, Sq, Sk], which is added to the scores.

    Rows are computed in chunks, and again for the gradient, so that no [Sq, Sk] matrix is materialised. A row without
    any key has maps of 0.
    """
    query, key = autocasted(query, key)
    batch, heads, keys, _ = key.shape
    scale = resolve_scale(scale, query.shape[3])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    step = max(1, CHUNK_BYTES // (8 * batch * heads * keys))
    with torch.autocast(query.device.type, enabled=False):
        key = key.to(wide)
        parts = []
        for first in range(0, rows[1], step):
            last = min(first + step, rows[1])
            own = slice(rows[0] + first, rows[0] + last)
            part = query[:, :, own], key, bias[:, :, own], selection
            if torch.is_grad_enabled() and last - first < rows[1]:
                parts.append(checkpoint(_chunk, *part, scale, reduce_heads, use_reentrant=False))
            else:
                parts.append(_chunk(*part, scale, reduce_heads))
        return torch.cat(parts, dim=-1)


def _chunk(
    query: Tensor, key: Tensor, bias: Tensor, selection: TokenSelection, scale: float, reduce_heads: bool
) -> Tensor:
    scores = torch.matmul(query.to(key.dtype), key.transpose(-1, -2)) * scale
    scores = scores + bias.to(key.dtype)
    index = selection.index
    positions = index.clamp(min=0).long()[:, None, None].expand(-1, query.shape[1], query.shape[2], -1)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    exponent = scores.gather(3, positions) - lse.masked_fill(lse == float("-inf"), 0.0)
    selected = exponent.exp().masked_fill((index == EMPTY)[:, None, None], 0.0)  # [B, H, R, T]
    equation = "bhrt,bgt->bgr" if reduce_heads else "bhrt,bgt->bghr"
    maps = torch.einsum(equation, selected, selection.weight.to(selected.dtype))
    return maps / selected.shape[1] if reduce_heads else maps
