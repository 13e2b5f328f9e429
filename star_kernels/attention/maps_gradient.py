"""The gradient of the maps with respect to query, key and log-sum-exp: sparse, so a few small matrix products.

With M = sum_t w_t exp(s_t - lse) and an upstream gradient g: dS_t = P_t g w_t on the selected tokens, and
dlse = -sum_t dS_t. An attention that returned the log-sum-exp carries dlse on to all its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from star_kernels.selection import EMPTY


@dataclass(frozen=True)
class MapsGradient:
    """Gradient on the rows of one tensor and the selected tokens of the other; ``lse`` is whole, [B, H, Sq]."""

    rows: Tensor  # [B, H, R, D]
    start: int
    tokens: Tensor  # [B, H, T, D]
    slots: Tensor  # int64 [B, H, T, D], the tokens' positions
    lse: Tensor
    text_to_image: bool

    def add_to(self, grad_query: Tensor, grad_key: Tensor) -> None:
        """Adds it to whole float32 gradients, in place."""
        dense, gathered = (grad_key, grad_query) if self.text_to_image else (grad_query, grad_key)
        dense[:, :, self.start : self.start + self.rows.shape[2]] += self.rows
        gathered.scatter_add_(2, self.slots, self.tokens)


def compute(
    grad_maps: Tensor,  # [B, G, R] or [B, G, H, R]
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    index: Tensor,
    weight: Tensor,
    key_mask: Tensor | None,
    rows: tuple[int, int],
    scale: float,
    reduce_heads: bool,
    text_to_image: bool,
) -> MapsGradient:
    start, length = rows
    heads, width = query.shape[1], query.shape[3]
    dense, gathered = (key, query) if text_to_image else (query, key)
    positions = index.clamp(min=0).long()  # [B, T]
    slots = positions[:, None, :, None].expand(-1, heads, -1, width)
    dense = dense[:, :, start : start + length].float()  # [B, H, R, D]
    tokens = gathered.gather(2, slots).float()  # [B, H, T, D]
    normaliser = lse.gather(2, slots[..., 0])[:, :, None] if text_to_image else lse[:, :, start : start + length, None]

    counts = (index != EMPTY)[:, None, None]  # [B, 1, 1, T]
    if key_mask is not None:
        by_row = key_mask[:, None, start : start + length, None] if text_to_image else None
        counts = counts & (by_row if by_row is not None else key_mask.gather(1, positions)[:, None, None])
    exponent = (torch.matmul(dense, tokens.transpose(-1, -2)) * scale - normaliser).masked_fill(~counts, float("-inf"))
    if reduce_heads:
        upstream = torch.einsum("bgr,bgt->brt", grad_maps / heads, weight)[:, None]
    else:
        upstream = torch.einsum("bghr,bgt->bhrt", grad_maps, weight)
    grad_scores = torch.exp(exponent) * upstream  # [B, H, R, T]

    grad_lse = torch.zeros(lse.shape, dtype=lse.dtype, device=lse.device)
    if text_to_image:
        grad_lse.scatter_add_(2, slots[..., 0], -grad_scores.sum(dim=2))
    else:
        grad_lse[:, :, start : start + length] = -grad_scores.sum(dim=3)
    return MapsGradient(
        rows=torch.matmul(grad_scores, tokens) * scale,
        start=start,
        tokens=torch.matmul(grad_scores.transpose(-1, -2), dense) * scale,
        slots=slots,
        lse=grad_lse,
        text_to_image=text_to_image,
    )
