"""The backward pass of flash attention (Dao, arXiv 2307.08691), including the gradient of the maps.

With P the probabilities, gw_it = sum_g grad_maps_ig weight_gt on the selected keys and zero elsewhere:

    dS_ij   = P_ij (dO_i . V_j + gw_ij - delta_i)
    delta_i = dO_i . O_i + sum_t P_it gw_it - grad_lse_i
    dQ = scale dS K        dK = scale dS^T Q        dV = P^T dO

A program of the first launch computes delta and dQ of a tile of queries; the map term needs only the selected keys.
A program of the second computes dK and dV of a tile of keys, and adds gw only if the tile has a selected key. There are
no atomic additions, so equal calls give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.layouts import dense_rows, result_like
from star_kernels.attention.triton_config import BackwardConfig, architecture, backward_config
from star_kernels.attention.triton_tiles import (
    BLOCK_T,
    LOG2E,
    SIZES,
    load_rows,
    load_tokens,
    mask_bytes,
    padded,
    store_rows,
    token_probabilities,
    token_scores,
)

SCATTER = 256  # positions in a program of scatter_kernel, a multiple of the tiles of keys


@triton.jit(do_not_specialize=[*SIZES, "padded_queries", "padded_keys", "heads"])
def scatter_kernel(
    p_index, p_weight, p_grad_maps, p_table, p_grads, stride_gb, stride_gg, stride_gh, stride_gr,
    padded_queries, padded_keys, row_start, n_rows, slots, heads, share, BLOCK: tl.constexpr,
):  # fmt: skip
    """The factors of the maps' gradient, dense and padded with zeros, so that the other kernels load them unmasked.

    table[b, g, j] is the sum of the weights of all slots that select key j, and grads[b, g, h, i] is share times the
    gradient of row i.
    """
    o_b = tl.program_id(2).to(tl.int64)
    o_g = tl.program_id(1).to(tl.int64)
    o_bg = o_b * tl.num_programs(1) + o_g
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_table = tl.zeros([BLOCK], dtype=tl.float32)
    for t0 in tl.range(0, slots, BLOCK_T, num_stages=1):
        o_t = t0 + tl.arange(0, BLOCK_T)
        b_index = tl.load(p_index + o_b * slots + o_t, mask=o_t < slots, other=-1)
        b_w = tl.load(p_weight + o_bg * slots + o_t, mask=o_t < slots, other=0.0)
        b_table += tl.sum(tl.where(b_index[None, :] == o_n[:, None], b_w[None, :], 0.0), axis=1)
    tl.store(p_table + o_bg * padded_keys + o_n, b_table, mask=o_n < padded_keys)
    o_r = o_n - row_start
    m_r = (o_r >= 0) & (o_r < n_rows)
    p_grad_maps += o_b * stride_gb + o_g * stride_gg + o_r.to(tl.int64) * stride_gr
    p_grads += o_bg * heads * padded_queries + o_n
    for _ in range(0, heads):
        b_g = tl.load(p_grad_maps, mask=m_r, other=0.0)
        tl.store(p_grads, b_g * share, mask=o_n < padded_queries)
        p_grad_maps += stride_gh
        p_grads += padded_queries


@triton.jit
def _add_map_term(
    b_acc,  # [BLOCK_M, BLOCK_D]
    b_delta,  # [BLOCK_M]
    b_q,  # [BLOCK_M, BLOCK_D]
    b_lse,  # [BLOCK_M], base 2
    p_k,
    stride_ks,
    p_index,
    p_weight,
    p_mask,
    p_grads,  # of this sample and head, from the first row
    stride_gg,
    slots,
    keys,
    phrases,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds sum_t P_it gw_it k_t to the accumulator of dQ and sum_t P_it gw_it to delta."""
    for t0 in tl.range(0, slots, BLOCK_T, num_stages=1):
        o_t = t0 + tl.arange(0, BLOCK_T)
        _, m_t, b_k = load_tokens(p_k, stride_ks, p_index, p_mask, t0, slots, keys, HEAD_DIM, BLOCK_D)
        b_p = token_probabilities(token_scores(b_q, b_k), b_lse[:, None], m_t, scale_log2)
        b_gw = tl.zeros([BLOCK_M, BLOCK_T], dtype=tl.float32)
        p_g, p_w = p_grads + tl.arange(0, BLOCK_M), p_weight + o_t
        for _ in tl.range(0, phrases, num_stages=1):
            b_g = tl.load(p_g)
            b_w = tl.load(p_w, mask=o_t < slots, other=0.0)
            b_gw += b_g[:, None] * b_w[None, :]
            p_g += stride_gg
            p_w += slots
        b_gw *= b_p
        b_delta += tl.sum(b_gw, axis=1)
        b_acc = tl.dot(b_gw.to(b_k.dtype), b_k, b_acc, input_precision="ieee")
    return b_acc, b_delta


@triton.jit
def _query_step(
    b_acc,  # [BLOCK_M, BLOCK_D]
    b_q,  # [BLOCK_M, BLOCK_D]
    b_do,  # [BLOCK_M, BLOCK_D]
    b_lse,  # [BLOCK_M], base 2
    b_delta,  # [BLOCK_M]
    p_k,
    p_v,
    p_mask,
    stride_ks,
    stride_vs,
    remaining,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAST: tl.constexpr,
):
    """Adds dS K of the tile of keys at p_k, of which only ``remaining`` exist if this is the LAST tile."""
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < remaining
    b_k = load_rows(p_k, stride_ks, o_n, m_n, HEAD_DIM, BLOCK_D, LAST)
    b_v = load_rows(p_v, stride_vs, o_n, m_n, HEAD_DIM, BLOCK_D, LAST)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if p_mask is not None:
        if LAST:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
        else:
            m_n = tl.load(p_mask + o_n) != 0
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    if p_mask is not None or LAST:
        b_p = tl.where(m_n[None, :], b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_acc, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    p_q, p_k, p_v, p_out, p_do, p_dq, p_lse, p_lse2, p_delta, p_grad_lse, p_grads, p_index, p_weight, p_mask,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_dob, stride_doh, stride_dos, stride_dqb, stride_dqh, stride_dqs,
    stride_gb, stride_gg, stride_gh,
    queries, keys, row_start, n_rows, slots, phrases, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
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
    o_lse = (o_b * tl.num_programs(1) + o_h) * queries + o_row

    p_do += o_b * stride_dob + o_h * stride_doh
    b_do = load_rows(p_do, stride_dos, o_row, m_m, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    p_out += o_b * stride_ob + o_h * stride_oh
    b_out = load_rows(p_out, stride_os, o_row, m_m, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1)
    if p_grad_lse is not None:
        b_delta -= tl.load(p_grad_lse + o_lse, mask=m_m, other=0.0)
    p_q += o_b * stride_qb + o_h * stride_qh
    b_q = load_rows(p_q, stride_qs, o_row, m_m, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    b_lse = tl.load(p_lse + o_lse, mask=m_m, other=float("inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)  # a row without any key: P is 0, not NaN
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if p_index is not None:
        if (first < row_start + n_rows) & (first + BLOCK_M > row_start):
            p_grads += o_b * stride_gb + o_h * stride_gh + first
            b_acc, b_delta = _add_map_term(
                b_acc, b_delta, b_q, b_lse, p_k, stride_ks, p_index + o_b * slots, p_weight + o_b * phrases * slots,
                p_mask, p_grads, stride_gg, slots, keys, phrases, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M,
            )  # fmt: skip
    o_saved = (o_b * tl.num_programs(1) + o_h) * tl.num_programs(0) * BLOCK_M + o_row
    tl.store(p_lse2 + o_saved, b_lse)  # including rows past the end: +inf and 0
    tl.store(p_delta + o_saved, b_delta)

    full = keys // BLOCK_N
    if not EVEN:
        last = (full * BLOCK_N).to(tl.int64)
        p_last_mask = p_mask
        if p_mask is not None:
            p_last_mask += last
        b_acc = _query_step(
            b_acc, b_q, b_do, b_lse, b_delta, p_k + last * stride_ks, p_v + last * stride_vs, p_last_mask,
            stride_ks, stride_vs, keys - full * BLOCK_N, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, LAST=True,
        )  # fmt: skip
    for _ in range(0, full):
        b_acc = _query_step(
            b_acc, b_q, b_do, b_lse, b_delta, p_k, p_v, p_mask, stride_ks, stride_vs, BLOCK_N, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_N, LAST=False,
        )  # fmt: skip
        p_k += BLOCK_N * stride_ks
        p_v += BLOCK_N * stride_vs
        if p_mask is not None:
            p_mask += BLOCK_N

    p_dq += o_b * stride_dqb + o_h * stride_dqh
    store_rows(b_acc * scale, p_dq, stride_dqs, o_row, m_m, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_value_loop(
    b_k,  # [BLOCK_N, BLOCK_D]
    b_v,  # [BLOCK_N, BLOCK_D]
    p_q,
    p_do,
    p_lse2,  # this and the next two of this sample and head
    p_delta,
    p_grads,
    p_table,  # of this sample, from the first key; None without maps
    selected,  # not zero if a key of the tile is selected
    stride_qs,
    stride_dos,
    stride_gg,
    queries,
    padded_keys,
    phrases,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK (unscaled) and dV of a tile of keys, over all queries."""
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    o_tile = tl.arange(0, BLOCK_M)
    for first in range(0, queries, BLOCK_M):
        o_m = first + o_tile
        o_row = tl.minimum(o_tile, queries - 1 - first)  # rows past the end repeat the last: finite, and their P is 0
        b_q = load_rows(p_q, stride_qs, o_row, o_row, HEAD_DIM, BLOCK_D, MASK_ROWS=False)
        b_do = load_rows(p_do, stride_dos, o_row, o_row, HEAD_DIM, BLOCK_D, MASK_ROWS=False)
        b_lse = tl.load(p_lse2 + o_m)
        b_delta = tl.load(p_delta + o_m)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_delta[None, :]
        if p_table is not None:
            if selected != 0.0:
                p_g, p_w = p_grads + first, p_table
                for _ in tl.range(0, phrases, num_stages=1):
                    b_g = tl.load(p_g + o_tile)
                    b_w = tl.load(p_w + tl.arange(0, BLOCK_N))
                    b_dp += b_w[:, None] * b_g[None, :]
                    p_g += stride_gg
                    p_w += padded_keys
        b_dk = tl.dot((b_p * b_dp).to(b_q.dtype), b_q, b_dk, input_precision="ieee")
        p_q += BLOCK_M * stride_qs
        p_do += BLOCK_M * stride_dos
    return b_dk, b_dv


@triton.jit(do_not_specialize=SIZES)
def key_value_kernel(
    p_q, p_k, p_v, p_do, p_dk, p_dv, p_lse2, p_delta, p_grads, p_table, p_mask,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_gb, stride_gg, stride_gh,
    queries, padded_queries, keys, padded_keys, phrases, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    o_n = first + tl.arange(0, BLOCK_N)
    o_key = o_n.to(tl.int64)
    m_n = o_n < keys
    o_saved = (o_b * tl.num_programs(1) + o_h) * padded_queries
    p_q += o_b * stride_qb + o_h * stride_qh
    p_do += o_b * stride_dob + o_h * stride_doh
    p_k += o_b * stride_kb + o_h * stride_kh
    b_k = load_rows(p_k, stride_ks, o_key, m_n, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    p_v += o_b * stride_vb + o_h * stride_vh
    b_v = load_rows(p_v, stride_vs, o_key, m_n, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    selected = 0.0
    if p_table is not None:
        p_grads += o_b * stride_gb + o_h * stride_gh
        p_table += o_b * phrases * padded_keys + first
        p_w = p_table
        for _ in range(0, phrases):  # absolute: weights of both signs may cancel
            selected += tl.sum(tl.abs(tl.load(p_w + tl.arange(0, BLOCK_N))), axis=0)
            p_w += padded_keys
    b_dk, b_dv = _key_value_loop(
        b_k, b_v, p_q, p_do, p_lse2 + o_saved, p_delta + o_saved, p_grads, p_table, selected,
        stride_qs, stride_dos, stride_gg, queries, padded_keys, phrases, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if p_mask is not None:  # the columns of masked keys were computed without the mask; they affect no other key
        m_key = tl.load(p_mask + o_b * keys + o_key, mask=m_n, other=0) != 0
        b_dk = tl.where(m_key[:, None], b_dk, 0.0)
        b_dv = tl.where(m_key[:, None], b_dv, 0.0)
    p_dk += o_b * stride_dkb + o_h * stride_dkh
    p_dv += o_b * stride_dvb + o_h * stride_dvh
    store_rows(b_dk * scale, p_dk, stride_dks, o_key, m_n, HEAD_DIM, BLOCK_D)
    store_rows(b_dv, p_dv, stride_dvs, o_key, m_n, HEAD_DIM, BLOCK_D)


def attention_backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    arguments: MapArguments,
    *,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key and value from those of the three outputs, any of which may be None.

    Args:
        grad_out: ``[B, H, Sq, D]``, any strides.
        grad_maps: float32 ``[B, G, R]``, or ``[B, G, H, R]`` per head, any strides. None: plain flash attention's
            backward pass.
        grad_lse: float32 ``[B, H, Sq]``.
        query, key, value, arguments: those of the forward pass.
        out: ``[B, H, Sq, D]``, of the forward pass.
        lse: float32 ``[B, H, Sq]``, of the forward pass.
        config: tile and launch parameters; by default those of the device.

    Returns:
        The gradients, in the layouts of query, key and value.
    """
    index, weight, key_mask, start, n_rows, scale, reduce_heads = arguments.of_attention
    grad_query, grad_key, grad_value = result_like(query), result_like(key), result_like(value)
    query, key, value, out = dense_rows(query), dense_rows(key), dense_rows(value), dense_rows(out)
    grad_out = torch.zeros_like(out) if grad_out is None else dense_rows(grad_out)
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    config = config or backward_config(architecture(query.device), head_dim, query.dtype, key_mask is not None)
    shape = dict(HEAD_DIM=head_dim, BLOCK_D=padded(head_dim))
    with torch.cuda.device_of(query):
        largest = max(config.query.block_m, config.key_value.block_m)
        padded_queries = triton.cdiv(queries, largest) * largest
        padded_keys = triton.cdiv(keys, SCATTER) * SCATTER
        lse2, delta = torch.empty(2, batch, heads, padded_queries, dtype=torch.float32, device=query.device)
        mask = mask_bytes(key_mask)
        p_index, p_weight, table, grads = None, None, None, None
        phrases, slots = 1, 1
        strides: tuple[int, ...] = (0, 0, 0)
        if grad_maps is not None:
            p_index, p_weight = index.contiguous(), weight.contiguous()
            _, phrases, slots = weight.shape
            if reduce_heads:
                grad_maps = grad_maps[:, :, None]
            table = weight.new_empty(batch, phrases, padded_keys)
            grads = weight.new_empty(batch, phrases, grad_maps.shape[2], padded_queries)
            scatter_kernel[triton.cdiv(max(padded_keys, padded_queries), SCATTER), phrases, batch](
                p_index, p_weight, grad_maps, table, grads, *grad_maps.stride(), padded_queries, padded_keys, start,
                n_rows, slots, grads.shape[2], 1.0 / heads if reduce_heads else 1.0, BLOCK=SCATTER,
            )  # fmt: skip
            strides = grads.expand(-1, -1, heads, -1).stride()[:3]
        tile = config.query
        query_kernel[padded_queries // tile.block_m, heads, batch](
            query, key, value, out, grad_out, grad_query, lse.contiguous(), lse2, delta,
            None if grad_lse is None else grad_lse.contiguous(), grads, p_index, p_weight, mask,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *grad_out.stride()[:3],
            *grad_query.stride()[:3], *strides,
            queries, keys, start, n_rows, slots, phrases, scale, scale * LOG2E.value,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, EVEN=keys % tile.block_n == 0, **shape, **tile.launch,
        )  # fmt: skip
        tile = config.key_value
        key_value_kernel[triton.cdiv(keys, tile.block_n), heads, batch](
            query, key, value, grad_out, grad_key, grad_value, lse2, delta, grads, table, mask,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3],
            *grad_key.stride()[:3], *grad_value.stride()[:3], *strides,
            queries, padded_queries, keys, padded_keys, phrases, scale, scale * LOG2E.value,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **shape, **tile.launch,
        )  # fmt: skip
    return grad_query, grad_key, grad_value
