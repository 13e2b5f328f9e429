"""The gradient of the maps with respect to query, key and log-sum-exp: sparse, so a few small matrix products.

With M = sum_t w_t exp(s_t - lse) and an upstream gradient g: dS_t = P_t g w_t on the selected tokens, and
dlse = -sum_t dS_t. The backward pass of the attention that returned the log-sum-exp propagates dlse to all its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.masks import selected_pairs
from star_kernels.selection import EMPTY


@dataclass(frozen=True)
class MapsGradient:
    """Gradients with respect to the rows of one tensor, the selected tokens of the other, and the log-sum-exp."""

    rows: Tensor  # [B, H, R, D]
    start: int
    tokens: Tensor  # [B, H, T, D]
    positions: Tensor  # int64 [B, H, T, D], of the tokens
    lse: Tensor  # [B, H, Sq]
    text_to_image: bool

    def add_to(self, grad_query: Tensor, grad_key: Tensor) -> None:
        """Adds the sparse gradients to float32 gradients of query and key, in place."""
        dense, gathered = (grad_key, grad_query) if self.text_to_image else (grad_query, grad_key)
        dense[:, :, self.start : self.start + self.rows.shape[2]] += self.rows
        gathered.scatter_add_(2, self.positions, self.tokens)


def compute(
    grad_maps: Tensor,  # [B, G, R] or [B, G, H, R]
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    arguments: MapArguments,
) -> MapsGradient:
    start, n_rows, text_to_image = arguments.start, arguments.n_rows, arguments.text_to_image
    index, weight, key_mask = arguments.index, arguments.weight, arguments.key_mask
    heads, width = query.shape[1], query.shape[3]
    dense, gathered = (key, query) if text_to_image else (query, key)
    of_tokens = index.clamp(min=0).long()  # [B, T]
    positions = of_tokens[:, None, :, None].expand(-1, heads, -1, width)
    dense = dense[:, :, start : start + n_rows].float()  # [B, H, R, D]
    scaled = gathered.gather(2, positions).float() * arguments.scale  # [B, H, T, D]
    if text_to_image:
        normaliser = lse.gather(2, positions[..., 0])[:, :, None]  # [B, H, 1, T]
    else:
        normaliser = lse[:, :, start : start + n_rows, None]  # [B, H, R, 1]
    normaliser = normaliser.masked_fill(normaliser == float("-inf"), float("inf"))  # no key: probabilities of 0

    ignored = (index == EMPTY)[:, None, None]  # [B, 1, 1, T]
    if key_mask is not None:
        by_row = key_mask[:, None, start : start + n_rows, None] if text_to_image else None
        ignored = ignored | ~(by_row if by_row is not None else key_mask.gather(1, of_tokens)[:, None, None])
    if arguments.attn_mask is not None:
        ignored = ignored | ~selected_pairs(arguments.attn_mask, arguments)
    exponent = torch.matmul(dense, scaled.mT).sub_(normaliser).masked_fill_(ignored, float("-inf"))  # [B, H, R, T]
    if arguments.reduce_heads:
        upstream = torch.matmul(grad_maps.mT, weight / heads)[:, None]  # [B, 1, R, T]
    else:
        upstream = torch.matmul(grad_maps.permute(0, 2, 3, 1), weight[:, None])  # [B, H, R, T]
    grad_scores = exponent.exp_().mul_(upstream)  # [B, H, R, T]

    grad_lse = torch.zeros(lse.shape, dtype=lse.dtype, device=lse.device)
    if text_to_image:
        grad_lse.scatter_add_(2, positions[..., 0], -grad_scores.sum(dim=2))
    else:
        grad_lse[:, :, start : start + n_rows] = -grad_scores.sum(dim=3)
    return MapsGradient(
        rows=torch.matmul(grad_scores, scaled),
        start=start,
        tokens=torch.matmul(grad_scores.mT, dense) * arguments.scale,
        positions=positions,
        lse=grad_lse,
        text_to_image=text_to_image,
    )
