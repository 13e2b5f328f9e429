"""Backward of flash attention (Dao, arXiv 2307.08691) with the gradient of the maps folded in.

With P the probabilities, gw_it = sum_g grad_maps_ig weight_gt on the selected keys and zero elsewhere:

    dS_ij   = P_ij (dO_i . V_j + gw_ij - delta_i)
    delta_i = dO_i . O_i + sum_t P_it gw_it - grad_lse_i
    dQ = scale dS K        dK = scale dS^T Q        dV = P^T dO

The first launch owns query rows: it forms delta and dQ, whose map term needs only the selected keys. The second owns
keys: it forms dK and dV, and only tiles that hold a selected key add gw. No atomics, so equal calls give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.attention.triton_config import BackwardConfig, architecture, backward_config
from star_kernels.attention.triton_maps import (
    BLOCK_T,
    LOG2E,
    SIZES,
    attend_tokens,
    dense_rows,
    load_rows,
    load_tokens,
    mask_argument,
    padded,
    result_like,
    store_rows,
)

SCATTER = 256  # positions of a program of scatter_kernel; tiles of keys divide it


@triton.jit(do_not_specialize=[*SIZES, "padded_queries", "padded_keys", "heads"])
def scatter_kernel(
    p_index, p_weight, p_grad_maps, p_table, p_grads, stride_gb, stride_gg, stride_gh, stride_gr,
    padded_queries, padded_keys, row_start, row_length, tokens, heads, share, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the maps' gradient multiplies, dense and padded with zeros, so that the other kernels read it unmasked.

    table[b, g, j]: the weights of all slots that select key j. grads[b, g, h, i]: share * the gradient of row i.
    """
    o_b = tl.program_id(2).to(tl.int64)
    o_g = tl.program_id(1).to(tl.int64)
    o_bg = o_b * tl.num_programs(1) + o_g
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_table = tl.zeros([BLOCK], dtype=tl.float32)
    for t0 in tl.range(0, tokens, BLOCK_T, num_stages=1):
        o_t = t0 + tl.arange(0, BLOCK_T)
        b_index = tl.load(p_index + o_b * tokens + o_t, mask=o_t < tokens, other=-1)
        b_w = tl.load(p_weight + o_bg * tokens + o_t, mask=o_t < tokens, other=0.0)
        b_table += tl.sum(tl.where(b_index[None, :] == o_n[:, None], b_w[None, :], 0.0), axis=1)
    tl.store(p_table + o_bg * padded_keys + o_n, b_table, mask=o_n < padded_keys)
    o_r = o_n - row_start
    m_r = (o_r >= 0) & (o_r < row_length)
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
    p_grads,  # of this batch entry and head, from the first row
    stride_gg,
    tokens,
    keys,
    groups,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Adds sum_t P_it gw_it k_t to the accumulator of dQ and sum_t P_it gw_it to delta."""
    for t0 in tl.range(0, tokens, BLOCK_T, num_stages=1):
        o_t = t0 + tl.arange(0, BLOCK_T)
        b_index, m_t, b_k = load_tokens(p_k, stride_ks, p_index, t0, tokens, keys, HEAD_DIM, BLOCK_D)
        b_p = attend_tokens(b_q, b_lse, b_index, m_t, b_k, p_weight, p_mask, scale_log2, HAS_MASK, False)
        b_gw = tl.zeros([BLOCK_M, BLOCK_T], dtype=tl.float32)
        p_g, p_w = p_grads + tl.arange(0, BLOCK_M), p_weight + o_t
        for _ in tl.range(0, groups, num_stages=1):
            b_g = tl.load(p_g)
            b_w = tl.load(p_w, mask=o_t < tokens, other=0.0)
            b_gw += b_g[:, None] * b_w[None, :]
            p_g += stride_gg
            p_w += tokens
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
    HAS_MASK: tl.constexpr,
    LAST: tl.constexpr,
):
    """Adds dS K of the keys at p_k, of which ``remaining`` are left if this is the LAST tile."""
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < remaining
    b_k = load_rows(p_k, stride_ks, o_n, m_n, HEAD_DIM, BLOCK_D, LAST)
    b_v = load_rows(p_v, stride_vs, o_n, m_n, HEAD_DIM, BLOCK_D, LAST)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if HAS_MASK:
        if LAST:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
        else:
            m_n = tl.load(p_mask + o_n) != 0
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    if HAS_MASK or LAST:
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
    queries, keys, row_start, row_length, tokens, groups, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MAPS: tl.constexpr, GRAD_LSE: tl.constexpr, HAS_MASK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    o_row = o_m.to(tl.int64)
    m_m = o_m < queries
    p_k += o_b * stride_kb + o_h * stride_kh
    p_v += o_b * stride_vb + o_h * stride_vh
    p_mask += o_b * keys
    o_lse = (o_b * tl.num_programs(1) + o_h) * queries + o_row

    b_do = load_rows(p_do + o_b * stride_dob + o_h * stride_doh, stride_dos, o_row, m_m, HEAD_DIM, BLOCK_D, True)
    b_out = load_rows(p_out + o_b * stride_ob + o_h * stride_oh, stride_os, o_row, m_m, HEAD_DIM, BLOCK_D, True)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1)
    if GRAD_LSE:
        b_delta -= tl.load(p_grad_lse + o_lse, mask=m_m, other=0.0)
    b_q = load_rows(p_q + o_b * stride_qb + o_h * stride_qh, stride_qs, o_row, m_m, HEAD_DIM, BLOCK_D, True)
    b_lse = tl.load(p_lse + o_lse, mask=m_m, other=float("inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)  # without keys P is zero, and not NaN
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if MAPS:
        if (first < row_start + row_length) & (first + BLOCK_M > row_start):
            p_grads += o_b * stride_gb + o_h * stride_gh + first
            b_acc, b_delta = _add_map_term(
                b_acc, b_delta, b_q, b_lse, p_k, stride_ks, p_index + o_b * tokens, p_weight + o_b * groups * tokens,
                p_mask, p_grads, stride_gg, tokens, keys, groups, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, HAS_MASK,
            )  # fmt: skip
    o_statistic = (o_b * tl.num_programs(1) + o_h) * tl.num_programs(0) * BLOCK_M + o_row
    tl.store(p_lse2 + o_statistic, b_lse)  # rows past the end as well: +inf and 0
    tl.store(p_delta + o_statistic, b_delta)

    full = keys // BLOCK_N
    if not EVEN:
        last = (full * BLOCK_N).to(tl.int64)
        b_acc = _query_step(
            b_acc, b_q, b_do, b_lse, b_delta, p_k + last * stride_ks, p_v + last * stride_vs, p_mask + last,
            stride_ks, stride_vs, keys - full * BLOCK_N, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_MASK, True,
        )  # fmt: skip
    for _ in range(0, full):
        b_acc = _query_step(
            b_acc, b_q, b_do, b_lse, b_delta, p_k, p_v, p_mask, stride_ks, stride_vs, BLOCK_N, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_N, HAS_MASK, False,
        )  # fmt: skip
        p_k += BLOCK_N * stride_ks
        p_v += BLOCK_N * stride_vs
        p_mask += BLOCK_N

    p_dq += o_b * stride_dqb + o_h * stride_dqh
    store_rows(b_acc * scale, p_dq, stride_dqs, o_row, m_m, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_value_loop(
    b_k,  # [BLOCK_N, BLOCK_D]
    b_v,  # [BLOCK_N, BLOCK_D]
    p_q,
    p_do,
    p_lse2,  # of this batch entry and head
    p_delta,
    p_grads,
    p_table,  # of this batch entry, from the first key
    selected,
    stride_qs,
    stride_dos,
    stride_gg,
    queries,
    padded_keys,
    groups,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAPS: tl.constexpr,
):
    """dK (unscaled) and dV of a tile of keys, over all queries."""
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    o_tile = tl.arange(0, BLOCK_M)
    for first in range(0, queries, BLOCK_M):
        o_m = first + o_tile
        o_row = tl.minimum(o_tile, queries - 1 - first)  # rows past the end repeat the last: finite, and P is 0 there
        b_q = load_rows(p_q, stride_qs, o_row, o_row, HEAD_DIM, BLOCK_D, False)
        b_do = load_rows(p_do, stride_dos, o_row, o_row, HEAD_DIM, BLOCK_D, False)
        b_lse = tl.load(p_lse2 + o_m)
        b_delta = tl.load(p_delta + o_m)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_delta[None, :]
        if MAPS:
            if selected != 0.0:
                p_g, p_w = p_grads + first, p_table
                for _ in tl.range(0, groups, num_stages=1):
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
    queries, padded_queries, keys, padded_keys, groups, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MAPS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    o_n = first + tl.arange(0, BLOCK_N)
    o_key = o_n.to(tl.int64)
    m_n = o_n < keys
    o_statistic = (o_b * tl.num_programs(1) + o_h) * padded_queries
    p_q += o_b * stride_qb + o_h * stride_qh
    p_do += o_b * stride_dob + o_h * stride_doh
    b_k = load_rows(p_k + o_b * stride_kb + o_h * stride_kh, stride_ks, o_key, m_n, HEAD_DIM, BLOCK_D, True)
    b_v = load_rows(p_v + o_b * stride_vb + o_h * stride_vh, stride_vs, o_key, m_n, HEAD_DIM, BLOCK_D, True)
    selected = 0.0
    if MAPS:
        p_grads += o_b * stride_gb + o_h * stride_gh
        p_table += o_b * groups * padded_keys + first
        p_w = p_table
        for _ in range(0, groups):  # weights of both signs may add up to zero
            selected += tl.sum(tl.abs(tl.load(p_w + tl.arange(0, BLOCK_N))), axis=0)
            p_w += padded_keys
    b_dk, b_dv = _key_value_loop(
        b_k, b_v, p_q, p_do, p_lse2 + o_statistic, p_delta + o_statistic, p_grads, p_table, selected,
        stride_qs, stride_dos, stride_gg, queries, padded_keys, groups, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, MAPS,
    )  # fmt: skip
    if HAS_MASK:  # a masked key's column may hold anything; it reaches no other key
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
    index: Tensor | None,
    weight: Tensor | None,
    key_mask: Tensor | None,
    rows: tuple[int, int],
    scale: float,
    reduce_heads: bool,
    *,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from those of the three outputs, any of which may be None.

    Args:
        grad_out: ``[B, H, Sq, D]``, any strides.
        grad_maps: float32 ``[B, G, R]``, or ``[B, G, H, R]`` per head, any strides. None: plain flash backward.
        grad_lse: float32 ``[B, H, Sq]``.
        out: ``[B, H, Sq, D]``, of the forward pass.
        lse: float32 ``[B, H, Sq]``, of the forward pass.
        query, key, value, index, weight, key_mask, rows, scale, reduce_heads: as for the forward pass; ``index`` and
            ``weight`` are read only with ``grad_maps``.
        config: tile and launch parameters; by default those of the device.

    Returns:
        The gradients, in the layouts of query, key and value.
    """
    grad_query, grad_key, grad_value = result_like(query), result_like(key), result_like(value)
    query, key, value, out = dense_rows(query), dense_rows(key), dense_rows(value), dense_rows(out)
    grad_out = torch.zeros_like(out) if grad_out is None else dense_rows(grad_out)
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    start, length = rows
    config = config or backward_config(architecture(query.device), head_dim, query.dtype, key_mask is not None)
    share = 1.0 / heads if reduce_heads else 1.0
    has_maps, has_mask = grad_maps is not None, key_mask is not None
    shape = dict(HEAD_DIM=head_dim, BLOCK_D=padded(head_dim))
    with torch.cuda.device_of(query):
        rows_at_once = max(config.query.block_m, config.key_value.block_m)
        padded_queries = triton.cdiv(queries, rows_at_once) * rows_at_once
        lse2, delta = torch.empty(2, batch, heads, padded_queries, dtype=torch.float32, device=query.device)
        mask = mask_argument(key_mask, query)
        table, grads, groups, tokens = None, None, 1, 1
        padded_keys = triton.cdiv(keys, SCATTER) * SCATTER
        strides: tuple[int, ...] = (0, 0, 0)
        if grad_maps is not None and index is not None and weight is not None:
            index, weight = index.contiguous(), weight.contiguous()
            groups, tokens = weight.shape[1:]
            if reduce_heads:
                grad_maps = grad_maps[:, :, None]
            table = weight.new_empty(batch, groups, padded_keys)
            grads = weight.new_empty(batch, groups, grad_maps.shape[2], padded_queries)
            scatter_kernel[triton.cdiv(max(padded_keys, padded_queries), SCATTER), groups, batch](
                index, weight, grad_maps, table, grads, *grad_maps.stride(), padded_queries, padded_keys, start, length,
                tokens, grads.shape[2], share, BLOCK=SCATTER,
            )  # fmt: skip
            strides = grads.expand(-1, -1, heads, -1).stride()[:3]
        tile = config.query
        query_kernel[padded_queries // tile.block_m, heads, batch](
            query, key, value, out, grad_out, grad_query, lse.contiguous(), lse2, delta,
            None if grad_lse is None else grad_lse.contiguous(), grads, index, weight, mask,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *grad_out.stride()[:3],
            *grad_query.stride()[:3], *strides,
            queries, keys, start, length, tokens, groups, scale, scale * LOG2E.value,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, MAPS=has_maps, GRAD_LSE=grad_lse is not None,
            HAS_MASK=has_mask, EVEN=keys % tile.block_n == 0, **shape, **tile.launch,
        )  # fmt: skip
        tile = config.key_value
        key_value_kernel[triton.cdiv(keys, tile.block_n), heads, batch](
            query, key, value, grad_out, grad_key, grad_value, lse2, delta, grads, table, mask,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3],
            *grad_key.stride()[:3], *grad_value.stride()[:3], *strides,
            queries, padded_queries, keys, padded_keys, groups, scale, scale * LOG2E.value,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, MAPS=has_maps, HAS_MASK=has_mask, **shape, **tile.launch,
        )  # fmt: skip
    return grad_query, grad_key, grad_value
