"""Attention maps from a tile of queries that is on chip: the epilogue of the flash pass, and a kernel of its own.

    maps[b, g, r] = mean_h sum_t weight[b, g, t] * exp(scale * q[b, h, r] . k[b, h, index[b, t]] - lse[b, h, r])

The selected keys are gathered in chunks of 16, so the cost is that of one narrow matrix product. Every program owns its
rows of the per-head maps; the mean over heads is taken by the last head of a row tile to arrive, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.attention.triton_config import Tile, maps_config

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK_T = tl.constexpr(16)  # selected tokens a step, the narrowest tile that the matrix units take
PART_CHUNK = tl.constexpr(16)  # parts that the last program adds in one step

PROGRAMS = 384  # of a launch that only takes maps: about as many as run at once on a large GPU

_counters: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def load_rows(p_base, stride, o_rows, m_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Rows ``o_rows`` of a [S, D] matrix as a tile [ROWS, BLOCK_D], zero where masked or padded."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_base + o_rows[:, None] * stride + o_d[None, :]
    if HEAD_DIM % 8 == 0:  # dense_rows sees to it
        p_tile = tl.multiple_of(p_tile, (1, 16))
    if MASK_ROWS:
        return tl.load(p_tile, mask=m_rows[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    elif BLOCK_D != HEAD_DIM:
        return tl.load(p_tile, mask=(o_d < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(p_tile)


@triton.jit
def store_rows(b_tile, p_base, stride, o_rows, m_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes a tile [ROWS, BLOCK_D] to rows ``o_rows`` of a [S, D] matrix, except where masked or padded."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_base + o_rows[:, None] * stride + o_d[None, :]
    if HEAD_DIM % 8 == 0:
        p_tile = tl.multiple_of(p_tile, (1, 16))
    tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_rows[:, None] & (o_d < HEAD_DIM)[None, :])


@triton.jit
def load_tokens(
    p_gathered, stride_gathered, p_index, t0, tokens, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A chunk of selected tokens: their positions [BLOCK_T], which slots hold one, and their rows [BLOCK_T, BLOCK_D].

    A position past the sequence counts as an empty slot: compiled callers check no values, and memory stays memory.
    """
    o_t = t0 + tl.arange(0, BLOCK_T)
    b_index = tl.load(p_index + o_t, mask=o_t < tokens, other=-1)
    m_t = (b_index >= 0) & (b_index < length)
    b_index = tl.where(m_t, b_index, 0).to(tl.int64)
    return b_index, m_t, load_rows(p_gathered, stride_gathered, b_index, m_t, HEAD_DIM, BLOCK_D, True)


@triton.jit
def attend_tokens(
    b_dense,  # [ROWS, BLOCK_D]
    b_lse,  # [ROWS], base 2; unused with TOKEN_LSE
    b_index,  # these three from load_tokens
    m_t,
    b_gathered,
    p_token_lse,
    p_mask,
    scale_log2,
    HAS_MASK: tl.constexpr,
    TOKEN_LSE: tl.constexpr,
):
    """Probabilities [ROWS, BLOCK_T] of a chunk of selected tokens, zero in empty slots."""
    b_s = tl.dot(b_dense, tl.trans(b_gathered), input_precision="ieee")  # [ROWS, BLOCK_T]
    if TOKEN_LSE:
        b_token_lse = tl.load(p_token_lse + b_index, mask=m_t, other=0.0) * LOG2E
        b_p = tl.exp2(b_s * scale_log2 - b_token_lse[None, :])
    else:
        if HAS_MASK:
            m_t = m_t & (tl.load(p_mask + b_index, mask=m_t, other=0) != 0)
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    return tl.where(m_t[None, :], b_p, 0.0)


@triton.jit
def _load_weights(p_weight, o_g, t0, groups, tokens):
    """[BLOCK_G, BLOCK_T], zero where there is no group or no slot."""
    o_t = t0 + tl.arange(0, BLOCK_T)
    m_w = (o_g < groups)[:, None] & (o_t < tokens)[None, :]
    return tl.load(p_weight + o_g[:, None] * tokens + o_t[None, :], mask=m_w, other=0.0)


@triton.jit
def _head_map(
    b_dense,  # [BLOCK_M, BLOCK_D]
    b_lse,  # [BLOCK_M], base 2
    b_index,  # these three from load_tokens, with FIRST of the first chunk, and else None
    m_t,
    b_gathered,
    p_gathered,  # of this batch entry and head
    stride_gathered,
    p_token_lse,  # of this batch entry and head
    p_index,  # this and the next two of this batch entry
    p_weight,
    p_mask,
    o_g,
    tokens,
    length,  # of the sequence that the tokens are from
    groups,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TOKEN_LSE: tl.constexpr,
    FIRST: tl.constexpr,
    MORE: tl.constexpr,  # there may be other chunks
):
    """Maps [BLOCK_M, BLOCK_G] of one head."""
    b_map = tl.zeros([BLOCK_M, BLOCK_G], dtype=tl.float32)
    if FIRST:
        b_w = _load_weights(p_weight, o_g, 0, groups, tokens)
        b_p = attend_tokens(
            b_dense, b_lse, b_index, m_t, b_gathered, p_token_lse, p_mask, scale_log2, HAS_MASK, TOKEN_LSE
        )  # fmt: skip
        b_map += tl.sum(b_p[:, None, :] * b_w[None, :, :], axis=2)
    if MORE:
        for t0 in tl.range(BLOCK_T if FIRST else 0, tokens, BLOCK_T, num_stages=1):
            b_index_t, m_t_t, b_gathered_t = load_tokens(
                p_gathered, stride_gathered, p_index, t0, tokens, length, HEAD_DIM, BLOCK_D
            )  # fmt: skip
            b_p = attend_tokens(
                b_dense, b_lse, b_index_t, m_t_t, b_gathered_t, p_token_lse, p_mask, scale_log2, HAS_MASK, TOKEN_LSE
            )  # fmt: skip
            b_w = _load_weights(p_weight, o_g, t0, groups, tokens)
            b_map += tl.sum(b_p[:, None, :] * b_w[None, :, :], axis=2)
    return b_map


@triton.jit
def _store_part(b_map, p_partial, o_b, o_g, o_r, m_r, row_length, groups):
    """Writes maps [BLOCK_M, BLOCK_G] as those of part program_id(1) of the heads."""
    parts = tl.num_programs(1)
    p_partial += (o_b * groups * parts + tl.program_id(1)) * row_length
    p_tile = p_partial + o_g.to(tl.int64)[None, :] * parts * row_length + o_r[:, None]
    tl.store(p_tile, b_map, mask=m_r[:, None] & (o_g < groups)[None, :])


@triton.jit
def _average(p_counter, p_partial, p_maps, o_b, o_r, m_r, row_length, groups, heads):
    """The mean over all heads by the last part of a row tile to arrive, in a fixed order."""
    parts = tl.num_programs(1)
    tl.debug_barrier()  # all threads have stored before one of them announces it
    p_counter += o_b * tl.num_programs(0) + tl.program_id(0)
    arrived = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        tl.store(p_counter, 0)  # ready for the next launch
        p_partial += o_b * groups * parts * row_length
        p_maps += o_b * groups * row_length
        for _ in range(0, groups):
            b_sum = tl.zeros_like(o_r).to(tl.float32)
            for first in tl.range(0, parts, PART_CHUNK, num_stages=1):
                o_p = first + tl.arange(0, PART_CHUNK)
                p_tile = p_partial + o_p.to(tl.int64)[:, None] * row_length + o_r[None, :]
                # past the first-level cache, which may not have seen what other programs stored
                b_part = tl.load(p_tile, mask=(o_p < parts)[:, None] & m_r[None, :], other=0.0, cache_modifier=".cg")
                b_sum += tl.sum(b_part, axis=0)
            tl.store(p_maps + o_r, b_sum / heads, mask=m_r)
            p_partial += parts.to(tl.int64) * row_length
            p_maps += row_length


@triton.jit
def store_maps(
    b_dense,  # [BLOCK_M, BLOCK_D]
    b_lse,  # [BLOCK_M], base 2
    b_index,  # these three from load_tokens, with FIRST of the first chunk, and else None
    m_t,
    b_gathered,
    p_gathered,  # of this batch entry and head
    stride_gathered,
    p_index,
    p_weight,
    p_mask,  # of this batch entry
    p_maps,
    p_partial,
    p_counter,
    o_b,
    row_start,
    row_length,
    tokens,
    length,  # of the sequence that the tokens are from
    groups,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    REDUCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Writes the maps of row tile program_id(0) and head program_id(1); with REDUCE their mean over all heads."""
    o_r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M) - row_start
    m_r = (o_r >= 0) & (o_r < row_length)
    for g0 in range(0, groups, BLOCK_G):
        o_g = g0 + tl.arange(0, BLOCK_G)
        b_map = _head_map(
            b_dense, b_lse, b_index, m_t, b_gathered, p_gathered, stride_gathered, p_index, p_index + o_b * tokens,
            p_weight + o_b * groups * tokens, p_mask, o_g, tokens, length, groups, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_G, HAS_MASK, False, FIRST, True,
        )  # fmt: skip
        _store_part(b_map, p_partial, o_b, o_g, o_r, m_r, row_length, groups)
    if REDUCE:
        _average(p_counter, p_partial, p_maps, o_b, o_r, m_r, row_length, groups, tl.num_programs(1))


# Arguments whose values, such as 1 or a multiple of 16, must not start a compilation.
SIZES = ["queries", "keys", "row_start", "row_length", "tokens", "groups"]


@triton.jit(do_not_specialize=[*SIZES, "heads", "heads_of_part"])
def maps_kernel(
    p_dense, p_gathered, p_lse, p_index, p_weight, p_mask, p_maps, p_partial, p_counter,
    stride_db, stride_dh, stride_ds, stride_gb, stride_gh, stride_gs,
    heads, heads_of_part, queries, keys, row_start, row_length, tokens, groups, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
    REDUCE: tl.constexpr, HAS_MASK: tl.constexpr, TOKEN_LSE: tl.constexpr, ONE_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < row_length
    o_row = (row_start + o_m).to(tl.int64)
    p_dense += o_b * stride_db
    p_gathered += o_b * stride_gb
    p_lse += o_b * heads * queries
    p_index += o_b * tokens
    p_weight += o_b * groups * tokens
    p_mask += o_b * keys
    length = keys
    if TOKEN_LSE:
        length = queries
        p_mask += row_start  # the map's rows count from 0 here
    first_head = tl.program_id(1).to(tl.int64) * heads_of_part
    own_heads = tl.minimum(heads_of_part, heads - tl.program_id(1) * heads_of_part)
    for g0 in range(0, groups, BLOCK_G):
        o_g = g0 + tl.arange(0, BLOCK_G)
        b_map = tl.zeros([BLOCK_M, BLOCK_G], dtype=tl.float32)
        for head in tl.range(0, own_heads, num_stages=STAGES):
            o_h = first_head + head
            p_gathered_h, p_lse_h = p_gathered + o_h * stride_gh, p_lse + o_h * queries
            b_dense = load_rows(p_dense + o_h * stride_dh, stride_ds, o_row, m_m, HEAD_DIM, BLOCK_D, True)
            if TOKEN_LSE:
                b_lse = tl.zeros([BLOCK_M], dtype=tl.float32)
            else:
                b_lse = tl.load(p_lse_h + o_row, mask=m_m, other=0.0) * LOG2E
            b_index, m_t, b_gathered = None, None, None
            if ONE_CHUNK:
                b_index, m_t, b_gathered = load_tokens(
                    p_gathered_h, stride_gs, p_index, 0, tokens, length, HEAD_DIM, BLOCK_D
                )  # fmt: skip
            b_map += _head_map(
                b_dense, b_lse, b_index, m_t, b_gathered, p_gathered_h, stride_gs, p_lse_h, p_index, p_weight, p_mask,
                o_g, tokens, length, groups, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_G, HAS_MASK, TOKEN_LSE,
                ONE_CHUNK, not ONE_CHUNK,
            )  # fmt: skip
        if TOKEN_LSE and HAS_MASK:
            m_keys = tl.load(p_mask + o_m, mask=m_m, other=0) != 0
            b_map = tl.where(m_keys[:, None], b_map, 0.0)
        _store_part(b_map, p_partial, o_b, o_g, o_m, m_m, row_length, groups)
    if REDUCE:
        _average(p_counter, p_partial, p_maps, o_b, o_m, m_m, row_length, groups, heads)


def attention_maps(
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
    *,
    config: Tile | None = None,
) -> Tensor:
    """The maps of an attention that returned its log-sum-exp, in one launch.

    Args:
        query: ``[B, H, Sq, D]``, any strides.
        key: ``[B, H, Sk, D]``, any strides.
        lse: float32 ``[B, H, Sq]``, natural logarithm.
        index: int32 ``[B, T]``, selected keys (queries with ``text_to_image``); -1 is an empty slot.
        weight: float32 ``[B, G, T]``.
        key_mask: bool ``[B, Sk]``, true where a key takes part, or None.
        rows: (start, length) of the queries (keys with ``text_to_image``) that get a map.
        scale: factor of the scores.
        reduce_heads: whether to take the mean over heads.
        text_to_image: whether the selected tokens are queries and the rows keys.
        config: tile and launch parameters; by default those of the device.

    Returns:
        float32 ``[B, G, R]``, or ``[B, G, H, R]`` per head.
    """
    query, key = dense_rows(query), dense_rows(key)
    dense, gathered = (key, query) if text_to_image else (query, key)
    batch, heads, queries, head_dim = query.shape
    start, length = rows
    config = config or maps_config(head_dim, query.dtype, weight.shape[1] == 1 and key_mask is None)
    tiles, groups, tokens = triton.cdiv(length, config.block_m), weight.shape[1], index.shape[1]
    parts = min(heads, triton.cdiv(PROGRAMS, tiles * batch)) if reduce_heads and not torch.version.hip else heads
    heads_of_part = triton.cdiv(heads, parts)
    parts = triton.cdiv(heads, heads_of_part)
    with torch.cuda.device_of(query):
        maps, partial, counter = map_buffers(query, groups, length, reduce_heads, tiles, parts)
        mask = mask_argument(key_mask, query)
        maps_kernel[tiles, parts, batch](
            dense, gathered, lse.contiguous(), index.contiguous(), weight.contiguous(), mask, maps, partial, counter,
            *dense.stride()[:3], *gathered.stride()[:3],
            heads, heads_of_part, queries, key.shape[2], start, length, tokens, groups, scale * LOG2E.value,
            HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=config.block_m, BLOCK_G=group_tile(groups),
            REDUCE=counter is not None, HAS_MASK=key_mask is not None, TOKEN_LSE=text_to_image,
            ONE_CHUNK=tokens <= BLOCK_T.value, STAGES=config.num_stages, **config.launch,
        )  # fmt: skip
    return finished(maps, reduce_heads)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor as the kernels load it: each row contiguous, and on a 16-byte boundary if 8 divides the head dim.

    That holds for all usual layouts; anything else is copied, as are rows so far apart that the distance to the last
    one of a tile takes more than 32 bits.
    """
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    unit = 8 if tensor.shape[-1] % 8 == 0 else 1
    fits = tensor.stride(-1) == 1 and strides[-1] < 1 << 23 and (unit == 1 or tensor.data_ptr() % 16 == 0)
    if fits and all([n == 1 or s % unit == 0 for n, s in zip(sizes, strides, strict=True)]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def result_like(tensor: Tensor) -> Tensor:
    """An empty tensor in the layout of ``torch.empty_like``; where rows are not contiguous, a contiguous one."""
    if tensor.stride(-1) == 1:
        result = torch.empty_like(tensor)
        if result.stride(-1) == 1:
            return result
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def padded(head_dim: int) -> int:
    """The tile width that holds a head: a power of two, at least what the matrix units take."""
    return max(16, triton.next_power_of_2(head_dim))


def group_tile(groups: int) -> int:
    """Groups that share one pass over the selected tokens."""
    return min(4, triton.next_power_of_2(groups))


def mask_argument(key_mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask as contiguous bytes, or a pointer that is never read."""
    return like if key_mask is None else key_mask.contiguous().view(torch.uint8)


def map_buffers(
    query: Tensor, groups: int, length: int, reduce_heads: bool, tiles: int, parts: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The maps, those of each part of the heads (the same where the kernel reduces none), the tiles' arrival counters.

    There are as many parts as heads, or fewer where each is the sum of some.
    """
    batch, heads = query.shape[:2]
    partial = torch.empty(batch, groups, parts, length, dtype=torch.float32, device=query.device)
    if not reduce_heads or (torch.version.hip and heads > 1):  # AMD's barrier does not wait for stores to arrive
        return partial, partial, None
    if heads == 1:
        return partial.view(batch, groups, length), partial, None
    maps = torch.empty(batch, groups, length, dtype=torch.float32, device=query.device)
    return maps, partial, _arrival_counter(query.device, batch * tiles)


def finished(maps: Tensor, reduce_heads: bool) -> Tensor:
    """The maps of a launch, averaged over heads if they were to be and the kernel did not."""
    return maps.mean(dim=2) if reduce_heads and maps.ndim == 4 else maps


def _arrival_counter(device: torch.device, size: int) -> Tensor:
    """int32 zeros that every launch leaves at zero again.

    One buffer for each device and stream: launches on a stream run one after the other, so they can share it, and
    streams that run at once never do. A launch that is captured in a graph may be replayed on any stream, so it gets a
    buffer of its own, cleared by the graph.
    """
    if device.type != "cuda":
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
    counter = _counters.get((device, stream))
    if counter is None or counter.numel() < size:
        counter = torch.zeros(triton.next_power_of_2(size), dtype=torch.int32, device=device)
        _counters[device, stream] = counter
    return counter
