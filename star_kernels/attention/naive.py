"""The definitions of both attention operations, in plain differentiable PyTorch.

Every kernel is tested against these functions. They hold the whole [S, S] matrix of probabilities; inputs are what
``star_kernels.attention`` passes on after validation: layout [B, H, S, D], rows as (start, length).
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.selection import EMPTY


def attention(
    query: Tensor,  # [B, H, Sq, D]
    key: Tensor,  # [B, H, Sk, D]
    value: Tensor,  # [B, H, Sk, D]
    index: Tensor,  # [B, T]
    weight: Tensor,  # [B, G, T]
    key_mask: Tensor | None,  # [B, Sk], true where a key takes part
    rows: tuple[int, int],
    scale: float,
    reduce_heads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention, its maps [B, G, R] (or [B, G, H, R] per head) and its natural log-sum-exp [B, H, Sq]."""
    scores = torch.matmul(_wide(query), _wide(key).transpose(-1, -2)) * scale  # [B, H, Sq, Sk]
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    probability = torch.exp(scores - lse[..., None])
    if key_mask is not None:  # a row without any key attends to nothing
        probability = probability.masked_fill((lse == float("-inf"))[..., None], 0.0)
    out = torch.matmul(probability, _wide(value)).to(query.dtype)

    start, length = rows
    slots = _slots(index)[:, None, None].expand(-1, query.shape[1], length, -1)
    selected = probability[:, :, start : start + length].gather(3, slots)  # [B, H, R, T]
    return out, _aggregate(selected, index, weight, reduce_heads), lse


def attention_maps(
    query: Tensor,  # [B, H, Sq, D]
    key: Tensor,  # [B, H, Sk, D]
    lse: Tensor,  # [B, H, Sq]
    index: Tensor,  # [B, T]
    weight: Tensor,  # [B, G, T]
    key_mask: Tensor | None,  # [B, Sk]
    rows: tuple[int, int],
    scale: float,
    reduce_heads: bool,
    text_to_image: bool,
) -> Tensor:
    """The maps alone, P = exp(scale * q k - lse), from an attention that returned its log-sum-exp.

    Selected tokens are keys and rows are queries, or the reverse with ``text_to_image``.
    """
    start, length = rows
    dense, gathered = (key, query) if text_to_image else (query, key)
    dense = _wide(dense[:, :, start : start + length])  # [B, H, R, D]
    slots = _slots(index)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    scores = torch.matmul(dense, _wide(gathered.gather(2, slots)).transpose(-1, -2)) * scale  # [B, H, R, T]
    if text_to_image:
        normaliser = lse.gather(2, slots[..., 0])[:, :, None]  # [B, H, 1, T]
        attends = None if key_mask is None else key_mask[:, None, start : start + length, None]
    else:
        normaliser = lse[:, :, start : start + length, None]  # [B, H, R, 1]
        attends = None if key_mask is None else key_mask.gather(1, _slots(index))[:, None, None]
    exponent = scores - normaliser
    if attends is not None:  # before the exponential: a masked score is not bounded by the log-sum-exp
        exponent = exponent.masked_fill(~attends, float("-inf"))
    return _aggregate(torch.exp(exponent), index, weight, reduce_heads)


def _aggregate(selected: Tensor, index: Tensor, weight: Tensor, reduce_heads: bool) -> Tensor:
    """sum_t weight[b, g, t] * selected[b, h, r, t], as [B, G, R] or [B, G, H, R]."""
    selected = selected.masked_fill((index == EMPTY)[:, None, None], 0.0)
    equation = "bhrt,bgt->bgr" if reduce_heads else "bhrt,bgt->bghr"
    maps = torch.einsum(equation, selected, weight.to(selected.dtype))
    return maps / selected.shape[1] if reduce_heads else maps


def _slots(index: Tensor) -> Tensor:
    """Positions that can be gathered: an empty slot reads position 0 and is dropped afterwards."""
    return index.clamp(min=0).long()


def _wide(tensor: Tensor) -> Tensor:
    """The dtype of the arithmetic: float32, or float64 as given."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
