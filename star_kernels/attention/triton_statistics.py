"""Statistics of attention over all pairs of a row and a key, without the matrix of probabilities.

With scores s of a row, their maximum m, Z = sum exp(s - m) and U = sum exp(s - m) (s - m), one online pass over the
keys gives the log-sum-exp m + log Z and the entropy log Z - U / Z. A second kernel sums the probabilities of each key
over a range of rows; the ranges are added afterwards, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.attention.layouts import dense_rows
from star_kernels.attention.masks import expanded
from star_kernels.attention.triton_config import Tile, statistics_config
from star_kernels.attention.triton_maps import base_2, resident_programs
from star_kernels.attention.triton_tiles import LOG2E, load_rows, padded

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # below any score but finite: (-inf) - LOWEST is -inf, and (-inf) - (-inf) would be NaN
SIZES = ["rows", "keys", "splits", "stride_pb", "stride_ph", "stride_pr", "stride_pt"]


@triton.jit
def _scores(b_one, b_other, p_pairs, o_one, o_other, stride_one, stride_other, m_other, scale_log2):
    """Scores [ONE, OTHER] in base 2 of two tiles, -inf for pairs that do not take part or lie past the end."""
    b_s = tl.dot(b_one, tl.trans(b_other), input_precision="ieee") * scale_log2
    if p_pairs is not None:
        p_tile = p_pairs + o_one[:, None] * stride_one + o_other[None, :] * stride_other
        return tl.where(tl.load(p_tile, mask=m_other, other=0) != 0, b_s, float("-inf"))
    return tl.where(m_other, b_s, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    p_q, p_k, p_pairs, p_lse, p_entropy,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_pb, stride_ph, stride_pr, stride_pt,
    rows, keys, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp and entropy of a tile of rows of one head."""
    o_b = tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64)
    o_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_m = o_m < rows
    p_q += o_b * stride_qb + o_h * stride_qh
    p_k += o_b * stride_kb + o_h * stride_kh
    if p_pairs is not None:
        p_pairs += o_b * stride_pb + o_h * stride_ph
    b_q = load_rows(p_q, stride_qs, o_m, m_m, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_moment = tl.zeros([BLOCK_M], dtype=tl.float32)
    for first in tl.range(0, keys, BLOCK_N, num_stages=STAGES):
        o_n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < keys
        b_k = load_rows(p_k, stride_ks, o_n, m_n, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        b_s = _scores(
            b_q, b_k, p_pairs, o_m, o_n, stride_pr, stride_pt, m_m[:, None] & m_n[None, :], scale_log2
        )  # fmt: skip
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_change = b_max - b_new
        b_decay = tl.exp2(b_change)
        b_shifted = b_s - b_new[:, None]
        b_e = tl.exp2(b_shifted)
        b_moment = (b_moment + b_sum * b_change) * b_decay
        b_moment += tl.sum(tl.where(b_e > 0.0, b_e * b_shifted, 0.0), axis=1)  # 0 * -inf would be NaN
        b_sum = b_sum * b_decay + tl.sum(b_e, axis=1)
        b_max = b_new
    b_some = b_sum > 0.0  # a row without any key has the log-sum-exp -inf and the entropy 0
    b_log = tl.log2(tl.where(b_some, b_sum, 1.0))
    o_out = (o_b * tl.num_programs(1) + o_h) * rows + o_m
    tl.store(p_lse + o_out, tl.where(b_some, (b_max + b_log) * LN2, float("-inf")), mask=m_m)
    tl.store(p_entropy + o_out, (b_log - b_moment / tl.where(b_some, b_sum, 1.0)) * LN2, mask=m_m)


@triton.jit(do_not_specialize=SIZES)
def columns_kernel(
    p_q, p_k, p_pairs, p_lse, p_sums,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_pb, stride_ph, stride_pr, stride_pt,
    rows, keys, splits, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of the probabilities of a tile of keys of one head, over one of ``splits`` ranges of rows."""
    o_b = tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0) % splits
    o_n = (tl.program_id(0) // splits * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_n = o_n < keys
    p_q += o_b * stride_qb + o_h * stride_qh
    p_k += o_b * stride_kb + o_h * stride_kh
    p_lse += (o_b * tl.num_programs(1) + o_h) * rows
    if p_pairs is not None:
        p_pairs += o_b * stride_pb + o_h * stride_ph
    b_k = load_rows(p_k, stride_ks, o_n, m_n, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in tl.range(split * BLOCK_M, rows, splits * BLOCK_M, num_stages=STAGES):
        o_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = o_m < rows
        b_q = load_rows(p_q, stride_qs, o_m, m_m, HEAD_DIM, BLOCK_D, MASK_ROWS=True)
        b_lse = base_2(tl.load(p_lse + o_m, mask=m_m, other=0.0))
        b_s = _scores(
            b_k, b_q, p_pairs, o_n, o_m, stride_pt, stride_pr, m_n[:, None] & m_m[None, :], scale_log2
        )  # fmt: skip
        b_sum += tl.sum(tl.exp2(b_s - b_lse[None, :]), axis=1)
    o_out = ((o_b * tl.num_programs(1) + o_h) * splits + split) * keys + o_n
    tl.store(p_sums + o_out, b_sum, mask=m_n)


def attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    config: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy of the rows of query, float32 ``[B, H, R]``; -inf and 0 for rows without any key.

    Args:
        query: ``[B, H, R, D]``, any strides.
        key: ``[B, H, Sk, D]``, any strides.
        mask: bool ``[B or 1, H or 1, R or 1, Sk]``, any strides, true for the pairs that take part.
        scale: factor of the scores.
        config: tile and launch parameters; by default those of the head dimension.
    """
    query, key = dense_rows(query), dense_rows(key)
    batch, heads, rows, head_dim = query.shape
    config = config or statistics_config(head_dim, query.dtype)
    with torch.cuda.device_of(query):
        lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
        entropy = torch.empty_like(lse)
        rows_kernel[triton.cdiv(rows, config.block_m), heads, batch](
            *_inputs(query, key, mask, lse, entropy),
            rows,
            key.shape[2],
            scale * LOG2E.value,
            **_constants(config, query),
        )
    return lse, entropy


def attention_columns(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    config: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Sums of the probabilities of each key over the rows of query, float32 ``[B, H, Sk]``.

    Args:
        query: ``[B, H, R, D]``, any strides.
        key: ``[B, H, Sk, D]``, any strides.
        lse: natural log-sum-exp of the rows, float32 ``[B, H, R]``.
        mask: bool ``[B or 1, H or 1, R or 1, Sk]``, any strides, true for the pairs that take part.
        scale: factor of the scores.
        config: tile and launch parameters; by default those of the head dimension.
        splits: number of ranges of rows; by default as many as fill the device.
    """
    query, key = dense_rows(query), dense_rows(key)
    batch, heads, rows, head_dim = query.shape
    keys = key.shape[2]
    config = config or statistics_config(head_dim, query.dtype)
    tiles = triton.cdiv(keys, config.block_n)
    if splits is None:
        wanted = triton.cdiv(resident_programs(query.device), tiles * heads * batch)
        splits = min(wanted, triton.cdiv(rows, config.block_m))
    with torch.cuda.device_of(query):
        sums = torch.empty(batch, heads, splits, keys, dtype=torch.float32, device=query.device)
        columns_kernel[tiles * splits, heads, batch](
            *_inputs(query, key, mask, lse.contiguous(), sums), rows, keys, splits, scale * LOG2E.value,
            **_constants(config, query),
        )  # fmt: skip
        return sums.sum(dim=2) if splits > 1 else sums.squeeze(2)


def _inputs(query: Tensor, key: Tensor, mask: Tensor | None, *others: Tensor) -> tuple[Tensor | int | None, ...]:
    """The tensors of a launch and their strides."""
    pairs: Tensor | None = None
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        pairs = expanded(mask, query, key.shape[2]).view(torch.uint8)
        strides = pairs.stride()
    return query, key, pairs, *others, *query.stride()[:3], *key.stride()[:3], *strides


def _constants(config: Tile, query: Tensor) -> dict[str, object]:
    head_dim = query.shape[3]
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "STAGES": config.num_stages, **config.launch,
    }  # fmt: skip
