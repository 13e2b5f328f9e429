"""Flash attention (Dao, arXiv 2307.08691) that also returns token-aggregated attention maps.

A program computes a tile of query rows of one head. The maps are computed after its loop over the keys, from the
log-sum-exp of the rows and one narrow matrix product with the selected keys, and written per head: no work in the loop,
and nothing that waits for other programs. The mean over heads is a second, tiny launch.

With tensor descriptors tiles are loaded by bulk copies (TMA on sm_90 and later), which require neither registers for
addresses nor masks: see docs/hopper.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents
from triton.tools.tensor_descriptor import TensorDescriptor

from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.layouts import dense_rows, result_like
from star_kernels.attention.triton_config import (
    Epilogue,
    Tile,
    architecture,
    epilogue_config,
    forward_config,
    overlaps_launches,
)
from star_kernels.attention.triton_maps import empty_maps, load_weights, mean_over_heads, store_maps
from star_kernels.attention.triton_tiles import (
    BLOCK_T,
    LOG2E,
    SIZES,
    load_positions,
    load_rows,
    mask_bytes,
    padded,
    store_rows,
    token_scores,
)

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # below any score but finite: (-inf) - LOWEST is -inf, and (-inf) - (-inf) would be NaN


@triton.jit
def _attend_tile(
    b_acc,  # [BLOCK_M, BLOCK_D]
    b_max,  # [BLOCK_M], of scale * q k in base 2
    b_sum,  # [BLOCK_M]
    b_q,  # [BLOCK_M, BLOCK_D]
    p_k,
    p_v,
    d_k,
    d_v,
    p_mask,
    stride_ks,
    stride_vs,
    o_first,
    remaining,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAST: tl.constexpr,
):
    """One step of the online softmax: a tile of keys, of which only ``remaining`` exist if this is the LAST tile.

    They are loaded from p_k and p_v, or with descriptors from position ``o_first``, with zeros past the end.
    """
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < remaining
    if d_k is None:
        b_k = load_rows(p_k, stride_ks, o_n, m_n, HEAD_DIM, BLOCK_D, LAST)
    else:
        b_k = d_k.load([tl.program_id(2), tl.program_id(1), o_first, 0]).reshape([BLOCK_N, BLOCK_D])
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if p_mask is not None:
        if LAST:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
        else:
            m_n = tl.load(p_mask + o_n) != 0
    if p_mask is not None or LAST:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_new_max[:, None])
    b_decay = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
    if d_v is None:
        b_v = load_rows(p_v, stride_vs, o_n, m_n, HEAD_DIM, BLOCK_D, LAST)
    else:
        b_v = d_v.load([tl.program_id(2), tl.program_id(1), o_first, 0]).reshape([BLOCK_N, BLOCK_D])
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="ieee")
    return b_acc, b_new_max, b_sum


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_q, p_k, p_v, d_q, d_k, d_v, p_out, p_lse, p_index, p_weight, p_mask, p_maps,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    queries, keys, row_start, n_rows, slots, phrases, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_CHUNK: tl.constexpr, ONE_PHRASE: tl.constexpr, TOKENS: tl.constexpr, OUTPUT_LAST: tl.constexpr,
    FOLLOWED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    if FOLLOWED:
        gdc_launch_dependents()
    o_b = tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    o_row = o_m.to(tl.int64)
    m_m = o_m < queries
    p_k += o_b * stride_kb + o_h * stride_kh
    p_v += o_b * stride_vb + o_h * stride_vh
    if p_mask is not None:
        p_mask += o_b * keys

    b_index, m_t, b_w, b_s = None, None, None, None
    if p_index is not None:
        p_index += o_b * slots
        p_weight += o_b * phrases * slots
        if TOKENS != "late":  # before the queries, as the addresses of the tokens' keys wait for it
            b_index, m_t = load_positions(p_index, p_mask, 0, slots, keys)
            if ONE_PHRASE:
                b_w = load_weights(p_weight, 0, slots)
    if d_q is None:
        p_q += o_b * stride_qb + o_h * stride_qh
        b_q = load_rows(p_q, stride_qs, o_row, m_m, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    else:
        b_q = d_q.load([tl.program_id(2), tl.program_id(1), first, 0]).reshape([BLOCK_M, BLOCK_D])
    b_gathered = None
    if p_index is not None and TOKENS != "late":
        b_gathered = load_rows(p_k, stride_ks, b_index, m_t, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        if TOKENS == "scores":
            b_s = token_scores(b_q, b_gathered)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    full = keys // BLOCK_N
    if not EVEN:  # first, while no accumulator uses registers; after the loop ptxas would serialise its products
        o_last = full * BLOCK_N
        last = o_last.to(tl.int64)
        p_last_mask = p_mask
        if p_mask is not None:
            p_last_mask += last
        b_acc, b_max, b_sum = _attend_tile(
            b_acc, b_max, b_sum, b_q, p_k + last * stride_ks, p_v + last * stride_vs, d_k, d_v, p_last_mask,
            stride_ks, stride_vs, o_last, keys - o_last, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, LAST=True,
        )  # fmt: skip
    p_k_tile, p_v_tile, p_mask_tile = p_k, p_v, p_mask
    for tile in range(0, full):
        b_acc, b_max, b_sum = _attend_tile(
            b_acc, b_max, b_sum, b_q, p_k_tile, p_v_tile, d_k, d_v, p_mask_tile, stride_ks, stride_vs,
            tile * BLOCK_N, BLOCK_N, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, LAST=False,
        )  # fmt: skip
        p_k_tile += BLOCK_N * stride_ks
        p_v_tile += BLOCK_N * stride_vs
        if p_mask is not None:
            p_mask_tile += BLOCK_N

    b_lse = b_max + tl.log2(b_sum)
    tl.store(p_lse + (o_b * tl.num_programs(1) + o_h) * queries + o_row, b_lse * LN2, mask=m_m)
    if p_mask is not None:  # a row without any key attends to nothing
        b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    p_out += o_b * stride_ob + o_h * stride_oh
    if not OUTPUT_LAST:
        store_rows(b_acc / b_sum[:, None], p_out, stride_os, o_row, m_m, HEAD_DIM, BLOCK_D)
    if p_index is not None:
        if (first < row_start + n_rows) & (first + BLOCK_M > row_start):
            o_r = o_m - row_start
            stride_g = tl.num_programs(1).to(tl.int64) * n_rows
            store_maps(
                token_scores(b_q, b_gathered) if TOKENS == "keys" else b_s, m_t, b_w, b_q, b_lse[:, None],
                None, None, None, 0, p_k, stride_ks, None, p_index, p_weight, p_mask,
                p_maps + (o_b * phrases * tl.num_programs(1) + o_h) * n_rows + o_r, (o_r >= 0) & (o_r < n_rows),
                stride_g, slots, keys, phrases, scale_log2, HEAD_DIM, BLOCK_D, ONE_CHUNK, ONE_PHRASE,
            )  # fmt: skip
    if OUTPUT_LAST:
        store_rows(b_acc / b_sum[:, None], p_out, stride_os, o_row, m_m, HEAD_DIM, BLOCK_D)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: MapArguments,
    *,
    with_maps: bool = True,
    config: Tile | None = None,
    epilogue: Epilogue | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Softmax attention, its maps and its log-sum-exp. The mean of the maps over heads is a second launch.

    Args:
        query: ``[B, H, Sq, D]``, float32, float16 or bfloat16, any strides.
        key: ``[B, H, Sk, D]``, any strides.
        value: ``[B, H, Sk, D]``, any strides.
        arguments: of the maps, and the key mask and scale of the attention.
        with_maps: if False, the same kernel without maps, to measure their cost.
        config: tile and launch parameters; by default those of the device.
        epilogue: how the maps are computed; by default as is best on the device.

    Returns:
        The output in the layout of ``query``; maps, float32 ``[B, G, R]``, or ``[B, G, H, R]`` per head, or None; the
        natural log-sum-exp, float32 ``[B, H, Sq]``. For a row without any key they are 0, 0 and -inf.
    """
    index, weight, key_mask, start, n_rows, scale, reduce_heads = arguments.of_attention
    if scale < 0:  # the kernel takes row maxima before scaling
        query, scale = -query, -scale
    scale = max(scale, 1e-30)  # 0 * -inf, of a masked score, would be NaN
    out = result_like(query)
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    device = architecture(query.device)
    config = config or forward_config(device, head_dim, query.dtype, key_mask is not None)
    _, phrases, slots = weight.shape
    one_chunk, one_phrase = slots <= BLOCK_T.value, phrases == 1
    if epilogue is None:
        simple = one_chunk and one_phrase and key_mask is None
        epilogue = epilogue_config(device, head_dim, query.dtype, config, simple, overlaps_launches(query.device))
    late = epilogue.tokens == "late"  # a variant for one phrase would only save the loads of its weights
    overlap = epilogue.overlap and with_maps and reduce_heads and heads > 1
    descriptors: tuple[TensorDescriptor | None, ...] = (None, None, None)
    if config.descriptors and query.dtype != torch.float32 and all(map(describable, (query, key, value))):
        tiles = ((query, config.block_m), (key, config.block_n), (value, config.block_n))
        descriptors = tuple(describe(tensor, tile_rows) for tensor, tile_rows in tiles)
    with torch.cuda.device_of(query):
        lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
        maps = empty_maps(query, arguments) if with_maps else None
        p_index, p_weight = (index.contiguous(), weight.contiguous()) if with_maps else (None, None)
        forward_kernel[triton.cdiv(queries, config.block_m), heads, batch](
            query, key, value, *descriptors, out, lse, p_index, p_weight, mask_bytes(key_mask), maps,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            queries, keys, start, n_rows, slots, phrases, scale * LOG2E.value,
            HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            ONE_CHUNK=one_chunk, ONE_PHRASE=one_phrase and not late, TOKENS=epilogue.tokens,
            OUTPUT_LAST=epilogue.output_last, FOLLOWED=overlap, EVEN=keys % config.block_n == 0, **config.launch,
        )  # fmt: skip
        if maps is not None and reduce_heads:
            maps = mean_over_heads(maps, overlap)
    return out, maps, lse


def describable(tensor: Tensor) -> bool:
    """Whether bulk copies can read a tensor of ``dense_rows``: rows of a multiple of 16 bytes, nothing expanded."""
    return tensor.shape[-1] % 8 == 0 and all(
        [n == 1 or s > 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    )


def describe(tensor: Tensor, tile_rows: int) -> TensorDescriptor:
    """A descriptor of tiles of ``tile_rows`` whole rows of one head, with zeros past the end of a sequence or row."""
    head_dim = tensor.shape[-1]
    strides = [head_dim if n == 1 else s for n, s in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, tile_rows, padded(head_dim)])
