"""The mask that differs by query, and what it says about the pairs of a map."""

from __future__ import annotations

from torch import Tensor

from star_kernels.attention.arguments import MapArguments


def expanded(attn_mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """A view [B, H, Sq, Sk] of the mask, without a copy."""
    return attn_mask.expand(*query.shape[:3], keys)


def selected_pairs(attn_mask: Tensor, arguments: MapArguments) -> Tensor:
    """The mask of the pairs of a row and a selected token, [B, H or 1, R, T]; of position 0 in empty slots."""
    start, n_rows = arguments.start, arguments.n_rows
    tokens = arguments.index.clamp(min=0).long()  # [B, T]
    batch, heads = tokens.shape[0], attn_mask.shape[1]
    if arguments.text_to_image:
        mask = attn_mask[..., start : start + n_rows]  # [B, H or 1, Sq or 1, R]
        if mask.shape[2] == 1:
            return mask.mT.expand(batch, -1, -1, tokens.shape[1])
        mask = mask.expand(batch, -1, -1, -1)
        return mask.gather(2, tokens[:, None, :, None].expand(-1, heads, -1, n_rows)).mT
    mask = attn_mask if attn_mask.shape[2] == 1 else attn_mask[:, :, start : start + n_rows]
    mask = mask.expand(batch, -1, -1, -1)
    found = mask.gather(3, tokens[:, None, None].expand(-1, heads, mask.shape[2], -1))
    return found.expand(-1, -1, n_rows, -1)
