"""Flash attention (Dao, arXiv 2307.08691) that also returns token-aggregated attention maps.

A program owns a tile of query rows of one head. After its loop over the keys it knows the rows' log-sum-exp, and the
maps cost one narrow matrix product with the selected keys: no second launch, no work in the loop.

With tensor descriptors the tiles come by bulk copies (TMA on sm_90 and later), which need neither registers for
addresses nor masks: see docs/hopper.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from star_kernels.attention.triton_config import Tile, architecture, forward_config, loads_tokens_early
from star_kernels.attention.triton_maps import (
    LOG2E,
    SIZES,
    dense_rows,
    finished,
    group_tile,
    load_rows,
    load_tokens,
    map_buffers,
    mask_argument,
    padded,
    result_like,
    store_maps,
    store_rows,
)

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # below any score but finite: -inf less the maximum of a row without keys is no NaN


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
    HAS_MASK: tl.constexpr,
    LAST: tl.constexpr,
):
    """One step of the online softmax: the keys at p_k, of which ``remaining`` are left if this is the LAST tile.

    With descriptors they are the keys from position ``o_first``; what is past the end comes as zeros.
    """
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < remaining
    if d_k is None:
        b_k = load_rows(p_k, stride_ks, o_n, m_n, HEAD_DIM, BLOCK_D, LAST)
    else:
        b_k = d_k.load([tl.program_id(2), tl.program_id(1), o_first, 0]).reshape([BLOCK_N, BLOCK_D])
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if HAS_MASK:
        if LAST:
            m_n = tl.load(p_mask + o_n, mask=m_n, other=0) != 0
        else:
            m_n = tl.load(p_mask + o_n) != 0
    if HAS_MASK or LAST:
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
    p_q, p_k, p_v, d_q, d_k, d_v, p_out, p_lse, p_index, p_weight, p_mask, p_maps, p_partial, p_counter,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    queries, keys, row_start, row_length, tokens, groups, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
    MAPS: tl.constexpr, REDUCE: tl.constexpr, EARLY: tl.constexpr, HAS_MASK: tl.constexpr, EVEN: tl.constexpr,
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

    if d_q is None:
        b_q = load_rows(p_q + o_b * stride_qb + o_h * stride_qh, stride_qs, o_row, m_m, HEAD_DIM, BLOCK_D, True)
    else:
        b_q = d_q.load([tl.program_id(2), tl.program_id(1), first, 0]).reshape([BLOCK_M, BLOCK_D])
    b_index, m_t, b_gathered = None, None, None
    if MAPS and EARLY:  # see loads_tokens_early
        b_index, m_t, b_gathered = load_tokens(
            p_k, stride_ks, p_index + o_b * tokens, 0, tokens, keys, HEAD_DIM, BLOCK_D
        )  # fmt: skip
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    full = keys // BLOCK_N
    if not EVEN:  # first, where no accumulator takes registers yet; after the loop ptxas would serialise its products
        o_last = full * BLOCK_N
        last = o_last.to(tl.int64)
        b_acc, b_max, b_sum = _attend_tile(
            b_acc, b_max, b_sum, b_q, p_k + last * stride_ks, p_v + last * stride_vs, d_k, d_v, p_mask + last,
            stride_ks, stride_vs, o_last, keys - o_last, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_MASK, True,
        )  # fmt: skip
    p_k_tile, p_v_tile, p_mask_tile = p_k, p_v, p_mask
    for tile in range(0, full):
        b_acc, b_max, b_sum = _attend_tile(
            b_acc, b_max, b_sum, b_q, p_k_tile, p_v_tile, d_k, d_v, p_mask_tile, stride_ks, stride_vs,
            tile * BLOCK_N, BLOCK_N, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_MASK, False,
        )  # fmt: skip
        p_k_tile += BLOCK_N * stride_ks
        p_v_tile += BLOCK_N * stride_vs
        p_mask_tile += BLOCK_N

    b_lse = b_max + tl.log2(b_sum)
    tl.store(p_lse + (o_b * tl.num_programs(1) + o_h) * queries + o_row, b_lse * LN2, mask=m_m)
    if HAS_MASK:  # a row without any key attends to nothing
        b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    p_out += o_b * stride_ob + o_h * stride_oh
    if not EARLY:
        store_rows(b_acc / b_sum[:, None], p_out, stride_os, o_row, m_m, HEAD_DIM, BLOCK_D)
    if MAPS:
        if (first < row_start + row_length) & (first + BLOCK_M > row_start):
            store_maps(
                b_q, b_lse, b_index, m_t, b_gathered, p_k, stride_ks, p_index, p_weight, p_mask, p_maps, p_partial,
                p_counter, o_b, row_start, row_length, tokens, keys, groups, scale_log2,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_G, REDUCE, HAS_MASK, EARLY,
            )  # fmt: skip
    if EARLY:  # last, since the maps' arrival counter waits for all stores before it
        store_rows(b_acc / b_sum[:, None], p_out, stride_os, o_row, m_m, HEAD_DIM, BLOCK_D)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    key_mask: Tensor | None,
    rows: tuple[int, int],
    scale: float,
    reduce_heads: bool,
    *,
    config: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Softmax attention, its maps and its log-sum-exp, in one launch.

    Args:
        query: ``[B, H, Sq, D]``, float32, float16 or bfloat16, any strides.
        key: ``[B, H, Sk, D]``, any strides.
        value: ``[B, H, Sk, D]``, any strides.
        index: int32 ``[B, T]``, selected keys; -1 is an empty slot. None: the same kernel without maps.
        weight: float32 ``[B, G, T]``, or None with ``index``.
        key_mask: bool ``[B, Sk]``, true where a key takes part, or None.
        rows: (start, length) of the queries that get a map.
        scale: factor of the scores.
        reduce_heads: whether the maps are the mean over heads.
        config: tile and launch parameters; by default those of the device.

    Returns:
        The output in the layout of ``query``; maps, float32 ``[B, G, R]``, or ``[B, G, H, R]`` per head (None without
        ``index``); the natural log-sum-exp, float32 ``[B, H, Sq]``. A row without any key gives 0, 0 and -inf.
    """
    if scale < 0:  # the kernel takes the maximum before it scales
        query, scale = -query, -scale
    scale = max(scale, 1e-30)  # zero would turn the -inf of a masked score into NaN
    out = result_like(query)
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    start, length = rows
    config = config or forward_config(architecture(query.device), head_dim, query.dtype, key_mask is not None)
    descriptors: tuple[TensorDescriptor | None, ...] = (None, None, None)
    if config.descriptors and query.dtype != torch.float32 and all(map(describable, (query, key, value))):
        tiles = ((query, config.block_m), (key, config.block_n), (value, config.block_n))
        descriptors = tuple(describe(tensor, rows) for tensor, rows in tiles)
    grid = (triton.cdiv(queries, config.block_m), heads, batch)
    with torch.cuda.device_of(query):
        lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
        maps = partial = counter = None
        groups = tokens = 1
        if index is not None and weight is not None:
            groups, tokens = weight.shape[1:]
            maps, partial, counter = map_buffers(query, groups, length, reduce_heads, grid[0], heads)
            index, weight = index.contiguous(), weight.contiguous()
        mask = mask_argument(key_mask, query)
        forward_kernel[grid](
            query, key, value, *descriptors, out, lse, index, weight, mask, maps, partial, counter,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            queries, keys, start, length, tokens, groups, scale * LOG2E.value,
            HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_G=group_tile(groups), MAPS=maps is not None, REDUCE=counter is not None,
            EARLY=loads_tokens_early(architecture(query.device), head_dim, query.dtype, config),
            HAS_MASK=key_mask is not None, EVEN=keys % config.block_n == 0,
            **config.launch,
        )  # fmt: skip
    return out, None if maps is None else finished(maps, reduce_heads), lse


def describable(tensor: Tensor) -> bool:
    """Whether bulk copies can read a tensor of :func:`dense_rows`: rows in units of 16 bytes, no dimension expanded."""
    return tensor.shape[-1] % 8 == 0 and all(
        [n == 1 or s > 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    )


def describe(tensor: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of tiles of ``rows`` whole rows of one head; past the end of a sequence or a row they hold zeros."""
    head_dim = tensor.shape[-1]
    strides = [head_dim if n == 1 else s for n, s in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, padded(head_dim)])
