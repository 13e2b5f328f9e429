"""The reference implementations of both attention operations, in plain differentiable PyTorch.

Every kernel is tested against these functions. They materialise the [Sq, Sk] matrix of probabilities. Inputs are those
of ``star_kernels.attention`` after validation, in layout [B, H, S, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.masks import selected_pairs
from star_kernels.selection import EMPTY


def attention(
    query: Tensor,  # [B, H, Sq, D]
    key: Tensor,  # [B, H, Sk, D]
    value: Tensor,  # [B, H, Sk, D]
    arguments: MapArguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention, its maps [B, G, R] (or [B, G, H, R] per head) and its natural log-sum-exp [B, H, Sq]."""
    key_mask = arguments.key_mask
    scores = torch.matmul(_wide(query), _wide(key).transpose(-1, -2)) * arguments.scale  # [B, H, Sq, Sk]
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    probability = torch.exp(scores - lse[..., None])
    if key_mask is not None:  # a row without any key attends to nothing
        probability = probability.masked_fill((lse == float("-inf"))[..., None], 0.0)
    out = torch.matmul(probability, _wide(value)).to(query.dtype)

    start, n_rows = arguments.start, arguments.n_rows
    positions = _positions(arguments.index)[:, None, None].expand(-1, query.shape[1], n_rows, -1)
    selected = probability[:, :, start : start + n_rows].gather(3, positions)  # [B, H, R, T]
    return out, _aggregate(selected, arguments), lse


def attention_maps(
    query: Tensor,  # [B, H, Sq, D]
    key: Tensor,  # [B, H, Sk, D]
    lse: Tensor,  # [B, H, Sq]
    arguments: MapArguments,
) -> Tensor:
    """The maps from the log-sum-exp of an attention: P = exp(scale * q k - lse), and 0 where lse is -inf."""
    start, n_rows, key_mask = arguments.start, arguments.n_rows, arguments.key_mask
    dense, gathered = (key, query) if arguments.text_to_image else (query, key)
    dense = _wide(dense[:, :, start : start + n_rows])  # [B, H, R, D]
    positions = _positions(arguments.index)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    scores = torch.matmul(dense, _wide(gathered.gather(2, positions)).transpose(-1, -2)) * arguments.scale
    if arguments.text_to_image:
        normaliser = lse.gather(2, positions[..., 0])[:, :, None]  # [B, H, 1, T]
        attends = None if key_mask is None else key_mask[:, None, start : start + n_rows, None]
    else:
        normaliser = lse[:, :, start : start + n_rows, None]  # [B, H, R, 1]
        attends = None if key_mask is None else key_mask.gather(1, _positions(arguments.index))[:, None, None]
    if arguments.attn_mask is not None:
        pairs = selected_pairs(arguments.attn_mask, arguments)
        attends = pairs if attends is None else attends & pairs
    exponent = scores - normaliser.masked_fill(normaliser == float("-inf"), float("inf"))  # [B, H, R, T]
    if attends is not None:  # before the exponential: a masked score may exceed the log-sum-exp, and exp would overflow
        exponent = exponent.masked_fill(~attends, float("-inf"))
    return _aggregate(torch.exp(exponent), arguments)


def rows(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy [B, H, R] of the rows of query: of a row without any key they are -inf and 0.

    The mask is bool [B or 1, H or 1, R or 1, Sk], true for the pairs that take part.
    """
    scores = torch.matmul(_wide(query), _wide(key).transpose(-1, -2)) * scale  # [B, H, R, Sk]
    lse = torch.logsumexp(scores if mask is None else scores.masked_fill(~mask, float("-inf")), dim=-1)
    log = scores - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]
    if mask is None:
        return lse, -(log.exp() * log).sum(dim=-1)
    probability = log.masked_fill(~mask, float("-inf")).exp()
    return lse, -(probability * log.masked_fill(~mask, 0.0)).sum(dim=-1)


def columns(query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Sums [B, H, Sk] of the probabilities of each key over the rows of query, whose log-sum-exp is given."""
    scores = torch.matmul(_wide(query), _wide(key).transpose(-1, -2)) * scale
    log = scores - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]
    return (log if mask is None else log.masked_fill(~mask, float("-inf"))).exp().sum(dim=2)


def _aggregate(selected: Tensor, arguments: MapArguments) -> Tensor:
    """sum_t weight[b, g, t] * selected[b, h, r, t], as [B, G, R] or [B, G, H, R]."""
    selected = selected.masked_fill((arguments.index == EMPTY)[:, None, None], 0.0)
    equation = "bhrt,bgt->bgr" if arguments.reduce_heads else "bhrt,bgt->bghr"
    maps = torch.einsum(equation, selected, arguments.weight.to(selected.dtype))
    return maps / selected.shape[1] if arguments.reduce_heads else maps


def _positions(index: Tensor) -> Tensor:
    """Positions for ``gather``: 0 for an empty slot, whose result is dropped afterwards."""
    return index.clamp(min=0).long()


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of the arithmetic: float64 for float64 inputs, otherwise float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
