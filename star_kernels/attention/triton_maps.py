"""Attention maps of a tile of rows: the end of the flash attention kernel, a separate kernel, and the mean over heads.

    maps[b, g, h, r] = sum_t weight[b, g, t] * exp(scale * q[b, h, r] . k[b, h, index[b, t]] - lse[b, h, r])

Both kernels write maps per head. The mean over heads is a launch of its own, which adds in a fixed order. On sm_90 and
later, the launches after an attention kernel are programmatic dependent launches: their blocks start while that kernel
ends, and wait for its results.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.layouts import dense_rows
from star_kernels.attention.masks import expanded
from star_kernels.attention.triton_config import Tile, maps_config, overlaps_launches
from star_kernels.attention.triton_tiles import (
    BLOCK_T,
    LOG2E,
    SIZES,
    load_rows,
    load_tokens,
    mask_bytes,
    padded,
    token_probabilities,
    token_scores,
)

UNROLL = tl.constexpr(8)  # heads whose maps mean_kernel loads at once
MEAN_ROWS = 128  # rows of a program of mean_kernel
PAIR_STRIDES = ["stride_pb", "stride_ph", "stride_pr", "stride_pt"]  # of the mask by query: [.., rows, tokens]
MOST_TILES = 8  # of rows in a program of maps_kernel, so that the programs of a large call end at about the same time


@triton.jit
def load_weights(p_weight, t0, slots):
    """Weights [BLOCK_T] of a chunk of selected tokens in one phrase."""
    o_t = t0 + tl.arange(0, BLOCK_T)
    return tl.load(p_weight + o_t, mask=o_t < slots, other=0.0)


@triton.jit
def _store_chunk(
    b_p, b_w, m_keys, p_weight, p_map, m_r, stride_g, t0, slots, phrases, ONE_CHUNK: tl.constexpr,
    ONE_PHRASE: tl.constexpr,
):  # fmt: skip
    """Writes the maps of a chunk of tokens, or adds them if it is not the first. ``b_w`` None: loads the weights."""
    if ONE_PHRASE:
        if b_w is None:
            b_w = load_weights(p_weight, t0, slots)
        _store_phrase(b_p, b_w, m_keys, p_map, m_r, t0, ONE_CHUNK)
    else:
        for _ in tl.range(0, phrases, num_stages=1):
            _store_phrase(b_p, load_weights(p_weight, t0, slots), m_keys, p_map, m_r, t0, ONE_CHUNK)
            p_weight += slots
            p_map += stride_g


@triton.jit
def _store_phrase(b_p, b_w, m_keys, p_map, m_r, t0, ONE_CHUNK: tl.constexpr):
    b_map = tl.sum(b_p * b_w[None, :], axis=1)  # in the layout of the product's result
    if m_keys is not None:
        b_map = tl.where(m_keys, b_map, 0.0)
    if not ONE_CHUNK:
        if t0 > 0:
            b_map += tl.load(p_map, mask=m_r, other=0.0)
    tl.store(p_map, b_map, mask=m_r)


@triton.jit
def base_2(b_lse):
    """The log-sum-exp in base 2. That of a row without any key is -inf, and becomes inf: its probabilities are 0."""
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def _masked_pairs(b_p, p_pairs, stride_pairs, b_index, m_r):
    """Probabilities of a chunk, zero for the pairs that the mask by query excludes."""
    p_tile = p_pairs[:, None] + b_index[None, :] * stride_pairs
    return tl.where(tl.load(p_tile, mask=m_r[:, None], other=0) != 0, b_p, 0.0)


@triton.jit
def store_maps(
    b_s,  # [BLOCK_M, BLOCK_T], this and the next two of the first chunk of tokens
    m_t,
    b_w,  # None: loaded here, as for more than one phrase
    b_dense,  # [BLOCK_M, BLOCK_D]
    b_lse,  # base 2, [BLOCK_M, 1], or [1, BLOCK_T] of the first chunk if the tokens are queries
    m_keys,  # [BLOCK_M], the key mask of the rows, if the tokens are queries
    b_index,  # [BLOCK_T], positions of the first chunk, if there is a mask by query
    p_pairs,  # [BLOCK_M], the mask by query of the rows and of token 0
    stride_pairs,  # from one token to the next
    p_gathered,  # of this sample and head
    stride_gathered,
    p_token_lse,  # of this sample and head, if the tokens are queries
    p_index,  # this and the next two of this sample
    p_weight,
    p_mask,
    p_map,  # [BLOCK_M], of the first phrase
    m_r,
    stride_g,  # from one phrase to the next
    slots,
    length,  # of the sequence that contains the tokens
    phrases,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    ONE_PHRASE: tl.constexpr,
):
    """Writes the maps of a tile of rows and one head."""
    if b_s is not None:
        b_p = token_probabilities(b_s, b_lse, m_t, scale_log2)
        if p_pairs is not None:
            b_p = _masked_pairs(b_p, p_pairs, stride_pairs, b_index, m_r)
        _store_chunk(b_p, b_w, m_keys, p_weight, p_map, m_r, stride_g, 0, slots, phrases, ONE_CHUNK, ONE_PHRASE)
    if b_s is None or not ONE_CHUNK:
        for t0 in tl.range(0 if b_s is None else BLOCK_T, slots, BLOCK_T, num_stages=1):
            b_more, m_more, b_gathered = load_tokens(
                p_gathered, stride_gathered, p_index, p_mask, t0, slots, length, HEAD_DIM, BLOCK_D
            )  # fmt: skip
            if p_token_lse is not None:
                b_lse = base_2(tl.load(p_token_lse + b_more, mask=m_more, other=0.0))[None, :]
            if not ONE_CHUNK:
                tl.debug_barrier()  # other threads of the block may have stored what this one adds to
            b_p = token_probabilities(token_scores(b_dense, b_gathered), b_lse, m_more, scale_log2)
            if p_pairs is not None:
                b_p = _masked_pairs(b_p, p_pairs, stride_pairs, b_more, m_r)
            _store_chunk(b_p, None, m_keys, p_weight, p_map, m_r, stride_g, t0, slots, phrases, ONE_CHUNK, ONE_PHRASE)


@triton.jit(do_not_specialize=[*SIZES, "tiles", *PAIR_STRIDES])
def maps_kernel(
    p_dense, p_gathered, p_lse, p_index, p_weight, p_mask, p_pairs, p_maps,
    stride_db, stride_dh, stride_ds, stride_gb, stride_gh, stride_gs,
    stride_pb, stride_ph, stride_pr, stride_pt,
    queries, keys, row_start, n_rows, slots, phrases, tiles, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TOKEN_LSE: tl.constexpr,
    ONE_CHUNK: tl.constexpr, ONE_PHRASE: tl.constexpr, OVERLAP: tl.constexpr, FOLLOWED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Maps of ``tiles`` tiles of rows and one head. The first chunk of tokens stays in shared memory."""
    if FOLLOWED:
        gdc_launch_dependents()
    if OVERLAP:
        gdc_wait()
    o_b = tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    p_index += o_b * slots
    p_weight += o_b * phrases * slots
    p_gathered += o_b * stride_gb + o_h * stride_gh
    p_lse += (o_b * heads + o_h) * queries
    length = queries if TOKEN_LSE else keys
    if p_mask is not None:
        p_mask += o_b * keys
    if p_pairs is not None:
        p_pairs += o_b * stride_pb + o_h * stride_ph
    p_token_lse = p_lse if TOKEN_LSE else None
    p_token_mask = None if TOKEN_LSE else p_mask
    b_index, m_t, b_gathered = load_tokens(
        p_gathered, stride_gs, p_index, p_token_mask, 0, slots, length, HEAD_DIM, BLOCK_D
    )  # fmt: skip
    b_w = load_weights(p_weight, 0, slots) if ONE_PHRASE else None
    p_dense += o_b * stride_db + o_h * stride_dh
    p_maps += (o_b * phrases * heads + o_h) * n_rows
    stride_g = heads.to(tl.int64) * n_rows
    first = tl.program_id(0) * tiles
    own_tiles = tl.minimum(tiles, tl.cdiv(n_rows, BLOCK_M) - first)
    o_m = first * BLOCK_M + tl.arange(0, BLOCK_M)
    if TOKEN_LSE:
        b_lse = base_2(tl.load(p_lse + b_index, mask=m_t, other=0.0))[None, :]
    else:
        p_lse += row_start
        b_next = tl.load(p_lse + o_m, mask=o_m < n_rows, other=0.0)
    for _ in tl.range(0, own_tiles, num_stages=STAGES):
        m_m = o_m < n_rows
        o_row = (row_start + o_m).to(tl.int64)
        b_dense = load_rows(p_dense, stride_ds, o_row, m_m, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        m_keys = None
        if TOKEN_LSE:
            b_lse_tile = b_lse
            if p_mask is not None:
                m_keys = tl.load(p_mask + o_row, mask=m_m, other=0) != 0
        else:
            b_lse_tile = base_2(b_next)[:, None]
            b_next = tl.load(p_lse + o_m + BLOCK_M, mask=o_m + BLOCK_M < n_rows, other=0.0)
        p_pairs_tile = None
        if p_pairs is not None:
            p_pairs_tile = p_pairs + o_row * stride_pr
        store_maps(
            token_scores(b_dense, b_gathered), m_t, b_w, b_dense, b_lse_tile, m_keys, b_index, p_pairs_tile, stride_pt,
            p_gathered, stride_gs, p_token_lse, p_index, p_weight, p_token_mask, p_maps + o_m, m_m, stride_g,
            slots, length, phrases, scale_log2, HEAD_DIM, BLOCK_D, ONE_CHUNK, ONE_PHRASE,
        )  # fmt: skip
        o_m += BLOCK_M


@triton.jit(do_not_specialize=["heads", "n_rows"])
def mean_kernel(p_maps, p_mean, heads, n_rows, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr):
    """The mean over heads of maps [B, G, heads, n_rows]."""
    if OVERLAP:
        gdc_wait()
    o_bg = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_rows
    p_maps += o_bg * heads * n_rows + o_r
    b_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
    for first in tl.range(0, heads, UNROLL, num_stages=1):
        for i in tl.static_range(UNROLL):
            b_sum += tl.load(p_maps, mask=m_r & (first + i < heads), other=0.0)
            p_maps += n_rows
    tl.store(p_mean + o_bg * n_rows + o_r, b_sum / heads, mask=m_r)


def attention_maps(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    arguments: MapArguments,
    *,
    config: Tile | None = None,
    overlap: bool | None = None,
) -> Tensor:
    """The maps from the log-sum-exp of an attention, which may be the preceding launch.

    Args:
        query: ``[B, H, Sq, D]``, any strides.
        key: ``[B, H, Sk, D]``, any strides.
        lse: float32 ``[B, H, Sq]``, natural logarithm.
        config: tile and launch parameters; by default those of the device.
        overlap: whether the launches are programmatic dependent launches; by default if the device supports them.

    Returns:
        float32 ``[B, G, R]``, or ``[B, G, H, R]`` per head.
    """
    index, weight, key_mask, start, n_rows, scale, reduce_heads, text_to_image, attn_mask = arguments
    query, key = dense_rows(query), dense_rows(key)
    dense, gathered = (key, query) if text_to_image else (query, key)
    batch, heads, queries, head_dim = query.shape
    _, phrases, slots = weight.shape
    one_chunk, one_phrase = slots <= BLOCK_T.value, phrases == 1
    config = config or maps_config(head_dim, query.dtype, one_chunk and one_phrase and key_mask is attn_mask is None)
    pairs: Tensor | None = None
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if attn_mask is not None:
        pairs = expanded(attn_mask, query, key.shape[2]).view(torch.uint8)
        strides = (pairs.mT if text_to_image else pairs).stride()
    overlap = overlaps_launches(query.device) if overlap is None else overlap
    followed = overlap and reduce_heads and heads > 1
    tiles = triton.cdiv(n_rows, config.block_m)
    of_program = min(MOST_TILES, triton.cdiv(tiles * heads * batch, resident_programs(query.device)))
    with torch.cuda.device_of(query):
        maps = empty_maps(query, arguments)
        maps_kernel[triton.cdiv(tiles, of_program), heads, batch](
            dense, gathered, lse.contiguous(), index.contiguous(), weight.contiguous(), mask_bytes(key_mask), pairs,
            maps, *dense.stride()[:3], *gathered.stride()[:3], *strides,
            queries, key.shape[2], start, n_rows, slots, phrases, of_program, scale * LOG2E.value,
            HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=config.block_m, TOKEN_LSE=text_to_image,
            ONE_CHUNK=one_chunk, ONE_PHRASE=one_phrase, OVERLAP=overlap, FOLLOWED=followed,
            STAGES=config.num_stages, **config.launch, **dependent(overlap),
        )  # fmt: skip
        return mean_over_heads(maps, overlap) if reduce_heads else maps


def empty_maps(query: Tensor, arguments: MapArguments) -> Tensor:
    """Memory for the maps per head, float32 [B, G, H, R]."""
    shape = arguments._replace(reduce_heads=False).shape(query.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=query.device)


def mean_over_heads(maps: Tensor, overlap: bool) -> Tensor:
    """Maps ``[B, G, R]`` from those per head, ``[B, G, H, R]``; with ``overlap``, while the kernel before them ends."""
    batch, phrases, heads, n_rows = maps.shape
    if heads == 1:
        return maps.view(batch, phrases, n_rows)
    mean = torch.empty(batch, phrases, n_rows, dtype=torch.float32, device=maps.device)
    mean_kernel[triton.cdiv(n_rows, MEAN_ROWS), batch * phrases](
        maps, mean, heads, n_rows, BLOCK_R=MEAN_ROWS, OVERLAP=overlap, **dependent(overlap)
    )
    return mean


def dependent(overlap: bool) -> dict[str, bool]:
    """The option of a Triton launch that may start before the launch before it ends; only CUDA knows it."""
    return {"launch_pdl": True} if overlap else {}


@cache
def resident_programs(device: torch.device) -> int:
    """The number of programs of maps_kernel that run at the same time, at least four on a multiprocessor."""
    if device.type != "cuda":
        return 432
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
