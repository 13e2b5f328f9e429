"""What ``attention_maps`` returns beside maps, and the log-sum-exp where the caller has none."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from star_kernels.attention import naive, ops, statistics
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.masks import selected_pairs
from star_kernels.selection import EMPTY

STATISTICS = ("token_entropy", "token_sums", "key_entropy", "key_sums")


class AttentionStatistics(NamedTuple):
    """Maps and statistics of :func:`attention_maps`, float32; None for those that were not asked for.

    Entropies are in nats, and 0 for a row without any key or token. Without ``reduce_heads`` all have a dimension H
    after B; else they are means over the heads, of the entropies of the heads and not of the mean distribution.
    """

    maps: Tensor  # [B, G, R]
    token_entropy: Tensor | None  # [B, R]: of a row's attention to the selected tokens, normalised over them
    token_sums: Tensor | None  # [B, T]: of the attention to each selected token, over the rows; 0 in empty slots
    key_entropy: Tensor | None  # [B, R]: of a row's attention to all keys
    key_sums: Tensor | None  # [B, Sk]: of the attention to each key, over the rows


def maps_and_statistics(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    arguments: MapArguments,
    wanted: Collection[str],
    reference: bool,
) -> AttentionStatistics:
    """The maps, and the statistics whose names are wanted; the log-sum-exp is computed if it is None.

    Args:
        reference: whether to run the reference implementation.
    """
    find = _Reference if reference else _Kernels
    if arguments.text_to_image:
        query, arguments = _of_tokens(query, arguments)
        assert lse is None
        assert not wanted
    else:
        query, lse, arguments = _of_rows(query, lse, arguments)
    scale, reduce_heads = arguments.scale, arguments.reduce_heads
    pairs = _pairs(arguments)
    key_entropy = None
    if lse is None:
        lse, key_entropy = find.rows(query, key, pairs, scale)
    elif "key_entropy" in wanted:
        key_entropy = find.rows(query, key, pairs, scale)[1]
    found: dict[str, Tensor | None] = dict.fromkeys(STATISTICS)
    if "key_entropy" in wanted:
        found["key_entropy"] = key_entropy
    if "key_sums" in wanted:
        found["key_sums"] = find.columns(query, key, lse, pairs, scale)
    if "token_entropy" in wanted or "token_sums" in wanted:
        tokens, counts = _tokens(key, arguments)
        if "token_entropy" in wanted:
            found["token_entropy"] = find.rows(query, tokens, counts, scale)[1]
        if "token_sums" in wanted:
            found["token_sums"] = find.columns(query, tokens, lse, counts, scale)
    for name, tensor in found.items():
        if tensor is not None:
            if name.endswith("entropy"):
                tensor = tensor.masked_fill(lse == float("-inf"), 0.0)
            found[name] = tensor.mean(dim=1) if reduce_heads else tensor
    return AttentionStatistics(find.maps(query, key, lse, arguments), **found)


class _Reference:
    rows = staticmethod(naive.rows)
    columns = staticmethod(naive.columns)
    maps = staticmethod(naive.attention_maps)


class _Kernels:
    rows = staticmethod(statistics.ATTENTION_ROWS)
    columns = staticmethod(statistics.ATTENTION_COLUMNS)

    @staticmethod
    def maps(query: Tensor, key: Tensor, lse: Tensor, arguments: MapArguments) -> Tensor:
        maps: Tensor = ops.ATTENTION_MAPS(
            query, key, lse, arguments.attn_mask, *arguments.of_attention, arguments.text_to_image
        )
        return maps


def _of_rows(query: Tensor, lse: Tensor | None, arguments: MapArguments) -> tuple[Tensor, Tensor | None, MapArguments]:
    """The queries that are rows of the maps, alone."""
    part, mask = slice(arguments.start, arguments.start + arguments.n_rows), arguments.attn_mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, part]
    query, lse = query[:, :, part], None if lse is None else lse[:, :, part]
    return query, lse, arguments._replace(start=0, attn_mask=mask)


def _of_tokens(query: Tensor, arguments: MapArguments) -> tuple[Tensor, MapArguments]:
    """The queries that are selected tokens, alone and in the order of the slots: [B, H, T, D]."""
    index, mask = arguments.index, arguments.attn_mask
    batch, slots = index.shape
    length = query.shape[2]
    filled, positions = _positions(index, length)
    order = torch.arange(slots, dtype=index.dtype, device=index.device).expand(batch, -1)
    if mask is not None and mask.shape[2] > 1:
        where = positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        mask = mask.expand(batch, -1, -1, -1).gather(2, where)
    query = query.gather(2, positions[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    past = index >= length  # for which the kernels raise
    own = order.where(filled, EMPTY).masked_fill(past, slots)
    return query, arguments._replace(index=own, attn_mask=mask)


def _tokens(key: Tensor, arguments: MapArguments) -> tuple[Tensor, Tensor]:
    """The keys of the selected tokens [B, H, T, D], and the mask [B, H or 1, R or 1, T] of the pairs that count."""
    counts, positions = _positions(arguments.index, key.shape[2])
    if arguments.key_mask is not None:
        counts = counts & arguments.key_mask.gather(1, positions)
    pairs = counts[:, None, None]
    if arguments.attn_mask is not None:
        pairs = pairs & selected_pairs(arguments.attn_mask, arguments._replace(index=positions))
    return key.gather(2, positions[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])), pairs


def _positions(index: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Which slots are filled, and their positions, 0 in others. A position past the sequence is as an empty slot: the
    kernels raise the error."""
    filled = (index != EMPTY) & (index < length)
    return filled, index.where(filled, 0).long()


def _pairs(arguments: MapArguments) -> Tensor | None:
    """Both masks in one, bool [B or 1, H or 1, Sq or 1, Sk]."""
    key_mask, attn_mask = arguments.key_mask, arguments.attn_mask
    if key_mask is None:
        return attn_mask
    by_key = key_mask[:, None, None]
    return by_key if attn_mask is None else attn_mask & by_key
