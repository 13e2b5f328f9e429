"""Attention maps of a tile of queries in registers: the epilogue of the flash attention kernel, and a separate kernel.

    maps[b, g, r] = mean_h sum_t weight[b, g, t] * exp(scale * q[b, h, r] . k[b, h, index[b, t]] - lse[b, h, r])

Every program writes its rows of the per-head maps. The last program of a row tile to arrive computes the mean over
heads, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.layouts import dense_rows
from star_kernels.attention.triton_config import Tile, maps_config
from star_kernels.attention.triton_tiles import (
    BLOCK_T,
    LOG2E,
    SIZES,
    attend_tokens,
    load_rows,
    load_tokens,
    mask_bytes,
    padded,
)
from star_kernels.counters import zero_counters

PART_CHUNK = tl.constexpr(16)  # parts that the last program adds in one step

PROGRAMS = 384  # in a launch of maps_kernel: about as many as run at once on a large GPU


@triton.jit
def _load_weights(p_weight, o_g, t0, phrases, slots):
    """Weights [BLOCK_G, BLOCK_T], zero past the last phrase and the last slot."""
    o_t = t0 + tl.arange(0, BLOCK_T)
    m_w = (o_g < phrases)[:, None] & (o_t < slots)[None, :]
    return tl.load(p_weight + o_g[:, None] * slots + o_t[None, :], mask=m_w, other=0.0)


@triton.jit
def _head_map(
    b_dense,  # [BLOCK_M, BLOCK_D]
    b_lse,  # [BLOCK_M], base 2
    b_index,  # this and the next two from load_tokens, of the first chunk, or None
    m_t,
    b_gathered,
    p_gathered,  # of this sample and head
    stride_gathered,
    p_token_lse,  # of this sample and head, if the tokens are queries
    p_index,  # this and the next two of this sample
    p_weight,
    p_mask,
    o_g,
    slots,
    length,  # of the sequence that contains the tokens
    phrases,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MORE: tl.constexpr,  # whether there may be chunks that are not loaded yet
):
    """Maps [BLOCK_M, BLOCK_G] of one head."""
    b_map = tl.zeros([BLOCK_M, BLOCK_G], dtype=tl.float32)
    if b_index is not None:
        b_w = _load_weights(p_weight, o_g, 0, phrases, slots)
        b_p = attend_tokens(b_dense, b_lse, b_index, m_t, b_gathered, p_token_lse, p_mask, scale_log2)
        b_map += tl.sum(b_p[:, None, :] * b_w[None, :, :], axis=2)
    if MORE:
        for t0 in tl.range(0 if b_index is None else BLOCK_T, slots, BLOCK_T, num_stages=1):
            b_index_t, m_t_t, b_gathered_t = load_tokens(
                p_gathered, stride_gathered, p_index, t0, slots, length, HEAD_DIM, BLOCK_D
            )  # fmt: skip
            b_p = attend_tokens(b_dense, b_lse, b_index_t, m_t_t, b_gathered_t, p_token_lse, p_mask, scale_log2)
            b_w = _load_weights(p_weight, o_g, t0, phrases, slots)
            b_map += tl.sum(b_p[:, None, :] * b_w[None, :, :], axis=2)
    return b_map


@triton.jit
def _store_part(b_map, p_partial, o_b, o_g, o_r, m_r, n_rows, phrases):
    """Writes the maps [BLOCK_M, BLOCK_G] of part program_id(1) of the heads."""
    parts = tl.num_programs(1)
    p_partial += (o_b * phrases * parts + tl.program_id(1)) * n_rows
    p_tile = p_partial + o_g.to(tl.int64)[None, :] * parts * n_rows + o_r[:, None]
    tl.store(p_tile, b_map, mask=m_r[:, None] & (o_g < phrases)[None, :])


@triton.jit
def _average(p_counter, p_partial, p_maps, o_b, o_r, m_r, n_rows, phrases, heads):
    """Writes the mean over all heads, in a fixed order, in the last part of a row tile to arrive."""
    parts = tl.num_programs(1)
    tl.debug_barrier()  # all threads have stored before one of them announces it
    p_counter += o_b * tl.num_programs(0) + tl.program_id(0)
    arrived = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        tl.store(p_counter, 0)  # ready for the next launch
        p_partial += o_b * phrases * parts * n_rows
        p_maps += o_b * phrases * n_rows
        for _ in range(0, phrases):
            b_sum = tl.zeros_like(o_r).to(tl.float32)
            for first in tl.range(0, parts, PART_CHUNK, num_stages=1):
                o_p = first + tl.arange(0, PART_CHUNK)
                p_tile = p_partial + o_p.to(tl.int64)[:, None] * n_rows + o_r[None, :]
                # not through the first-level cache, which may not have the stores of other programs
                b_part = tl.load(p_tile, mask=(o_p < parts)[:, None] & m_r[None, :], other=0.0, cache_modifier=".cg")
                b_sum += tl.sum(b_part, axis=0)
            tl.store(p_maps + o_r, b_sum / heads, mask=m_r)
            p_partial += parts.to(tl.int64) * n_rows
            p_maps += n_rows


@triton.jit
def store_maps(
    b_dense,  # [BLOCK_M, BLOCK_D]
    b_lse,  # [BLOCK_M], base 2
    b_index,  # this and the next two from load_tokens, of the first chunk, or None
    m_t,
    b_gathered,
    p_gathered,  # of this sample and head
    stride_gathered,
    p_index,
    p_weight,
    p_mask,  # of this sample
    p_maps,
    p_partial,
    p_counter,  # None for maps per head
    o_b,
    row_start,
    n_rows,
    slots,
    length,  # of the sequence that contains the tokens
    phrases,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Writes the maps of row tile program_id(0) and head program_id(1), and with counters their mean over heads."""
    o_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M) - row_start
    m_r = (o_r >= 0) & (o_r < n_rows)
    for g0 in range(0, phrases, BLOCK_G):
        o_g = g0 + tl.arange(0, BLOCK_G)
        b_map = _head_map(
            b_dense, b_lse, b_index, m_t, b_gathered, p_gathered, stride_gathered, None, p_index + o_b * slots,
            p_weight + o_b * phrases * slots, p_mask, o_g, slots, length, phrases, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_G, MORE=True,
        )  # fmt: skip
        _store_part(b_map, p_partial, o_b, o_g, o_r, m_r, n_rows, phrases)
    if p_counter is not None:
        _average(p_counter, p_partial, p_maps, o_b, o_r, m_r, n_rows, phrases, tl.num_programs(1))


@triton.jit(do_not_specialize=[*SIZES, "heads", "heads_of_part"])
def maps_kernel(
    p_dense, p_gathered, p_lse, p_index, p_weight, p_mask, p_maps, p_partial, p_counter,
    stride_db, stride_dh, stride_ds, stride_gb, stride_gh, stride_gs,
    heads, heads_of_part, queries, keys, row_start, n_rows, slots, phrases, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
    TOKEN_LSE: tl.constexpr, ONE_CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < n_rows
    o_row = (row_start + o_m).to(tl.int64)
    p_dense += o_b * stride_db
    p_gathered += o_b * stride_gb
    p_lse += o_b * heads * queries
    p_index += o_b * slots
    p_weight += o_b * phrases * slots
    length = queries if TOKEN_LSE else keys
    if p_mask is not None:
        p_mask += o_b * keys
    first_head = tl.program_id(1).to(tl.int64) * heads_of_part
    own_heads = tl.minimum(heads_of_part, heads - tl.program_id(1) * heads_of_part)
    for g0 in range(0, phrases, BLOCK_G):
        o_g = g0 + tl.arange(0, BLOCK_G)
        b_map = tl.zeros([BLOCK_M, BLOCK_G], dtype=tl.float32)
        for head in tl.range(0, own_heads, num_stages=STAGES):
            o_h = first_head + head
            p_gathered_h, p_lse_h = p_gathered + o_h * stride_gh, p_lse + o_h * queries
            b_dense = load_rows(p_dense + o_h * stride_dh, stride_ds, o_row, m_m, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
            b_lse, p_token_lse = None, None
            if TOKEN_LSE:
                p_token_lse = p_lse_h
            else:
                b_lse = tl.load(p_lse_h + o_row, mask=m_m, other=0.0) * LOG2E
            b_index, m_t, b_gathered = None, None, None
            if ONE_CHUNK:
                b_index, m_t, b_gathered = load_tokens(
                    p_gathered_h, stride_gs, p_index, 0, slots, length, HEAD_DIM, BLOCK_D
                )  # fmt: skip
            b_map += _head_map(
                b_dense, b_lse, b_index, m_t, b_gathered, p_gathered_h, stride_gs, p_token_lse, p_index, p_weight,
                p_mask, o_g, slots, length, phrases, scale_log2,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_G, MORE=not ONE_CHUNK,
            )  # fmt: skip
        if TOKEN_LSE and p_mask is not None:
            m_keys = tl.load(p_mask + row_start + o_m, mask=m_m, other=0) != 0
            b_map = tl.where(m_keys[:, None], b_map, 0.0)
        _store_part(b_map, p_partial, o_b, o_g, o_m, m_m, n_rows, phrases)
    if p_counter is not None:
        _average(p_counter, p_partial, p_maps, o_b, o_m, m_m, n_rows, phrases, heads)


def attention_maps(
    query: Tensor, key: Tensor, lse: Tensor, arguments: MapArguments, *, config: Tile | None = None
) -> Tensor:
    """The maps from the log-sum-exp of an attention, in one launch.

    Args:
        query: ``[B, H, Sq, D]``, any strides.
        key: ``[B, H, Sk, D]``, any strides.
        lse: float32 ``[B, H, Sq]``, natural logarithm.
        config: tile and launch parameters; by default those of the device.

    Returns:
        float32 ``[B, G, R]``, or ``[B, G, H, R]`` per head.
    """
    index, weight, key_mask, start, n_rows, scale, reduce_heads, text_to_image = arguments
    query, key = dense_rows(query), dense_rows(key)
    dense, gathered = (key, query) if text_to_image else (query, key)
    batch, heads, queries, head_dim = query.shape
    _, phrases, slots = weight.shape
    config = config or maps_config(head_dim, query.dtype, simple=phrases == 1 and key_mask is None)
    tiles = triton.cdiv(n_rows, config.block_m)
    parts = min(heads, triton.cdiv(PROGRAMS, tiles * batch)) if reduce_heads and not torch.version.hip else heads
    heads_of_part = triton.cdiv(heads, parts)
    parts = triton.cdiv(heads, heads_of_part)
    with torch.cuda.device_of(query):
        maps, partial, counter = map_buffers(query, arguments, tiles, parts)
        maps_kernel[tiles, parts, batch](
            dense, gathered, lse.contiguous(), index.contiguous(), weight.contiguous(), mask_bytes(key_mask),
            maps, partial, counter, *dense.stride()[:3], *gathered.stride()[:3],
            heads, heads_of_part, queries, key.shape[2], start, n_rows, slots, phrases, scale * LOG2E.value,
            HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=config.block_m, BLOCK_G=phrase_tile(phrases),
            TOKEN_LSE=text_to_image, ONE_CHUNK=slots <= BLOCK_T.value, STAGES=config.num_stages, **config.launch,
        )  # fmt: skip
    return finished(maps, reduce_heads)


def phrase_tile(phrases: int) -> int:
    """The number of phrases in one pass over the selected tokens."""
    return min(4, triton.next_power_of_2(phrases))


def map_buffers(query: Tensor, arguments: MapArguments, tiles: int, parts: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The maps, those of each part of the heads, and the arrival counters of the row tiles.

    A part is one head, or the sum of some. If the kernel does not compute the mean over heads, the parts are the maps
    and there are no counters.
    """
    batch, heads = query.shape[:2]
    phrases, n_rows = arguments.weight.shape[1], arguments.n_rows
    partial = torch.empty(batch, phrases, parts, n_rows, dtype=torch.float32, device=query.device)
    if not arguments.reduce_heads or (torch.version.hip and heads > 1):  # AMD's barrier does not wait for stores
        return partial, partial, None
    if heads == 1:
        return partial.view(batch, phrases, n_rows), partial, None
    maps = torch.empty(batch, phrases, n_rows, dtype=torch.float32, device=query.device)
    return maps, partial, zero_counters(query.device, batch * tiles)


def finished(maps: Tensor, reduce_heads: bool) -> Tensor:
    """The maps of a launch, averaged over heads if ``reduce_heads`` and the kernel has not done so."""
    return maps.mean(dim=2) if reduce_heads and maps.ndim == 4 else maps
