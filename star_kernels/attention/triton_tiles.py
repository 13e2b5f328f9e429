"""Functions that the forward, backward and maps kernels share: tiles of rows, and attention to the selected tokens.

The selected tokens come in chunks of 16, so their cost is that of one narrow matrix product. In these kernels a pointer
that is not used is None, for which Triton compiles a variant without it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK_T = tl.constexpr(16)  # slots in a chunk, the narrowest tile of the matrix units

# Arguments whose values, such as 1 or a multiple of 16, must not start a compilation.
SIZES = ["queries", "keys", "row_start", "n_rows", "slots", "phrases"]


@triton.jit
def load_rows(p_base, stride, o_rows, m_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Rows ``o_rows`` of a [S, D] matrix as a tile [ROWS, BLOCK_D], zero where masked or padded."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_base + o_rows[:, None] * stride + o_d[None, :]
    if HEAD_DIM % 8 == 0:  # layouts.dense_rows ensures it
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
def load_positions(p_index, p_mask, t0, slots, length):
    """Positions [BLOCK_T] of a chunk of selected tokens, and the mask of the slots that count.

    A position past the sequence counts as an empty slot: compiled callers do not check values, and it must not be read.
    ``p_mask`` is the key mask if the tokens are keys, else None.
    """
    o_t = t0 + tl.arange(0, BLOCK_T)
    b_index = tl.load(p_index + o_t, mask=o_t < slots, other=-1)
    m_t = (b_index >= 0) & (b_index < length)
    b_index = tl.where(m_t, b_index, 0).to(tl.int64)
    if p_mask is not None:
        m_t = m_t & (tl.load(p_mask + b_index, mask=m_t, other=0) != 0)
    return b_index, m_t


@triton.jit
def load_tokens(
    p_gathered, stride_gathered, p_index, p_mask, t0, slots, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A chunk of selected tokens: their positions, the mask of the slots that count, and rows [BLOCK_T, BLOCK_D]."""
    b_index, m_t = load_positions(p_index, p_mask, t0, slots, length)
    return b_index, m_t, load_rows(p_gathered, stride_gathered, b_index, m_t, HEAD_DIM, BLOCK_D, MASK_ROWS=True)


@triton.jit
def token_scores(b_dense, b_gathered):
    """Unscaled scores [ROWS, BLOCK_T] of a chunk of selected tokens."""
    return tl.dot(b_dense, tl.trans(b_gathered), input_precision="ieee")


@triton.jit
def token_probabilities(b_s, b_lse, m_t, scale_log2):
    """Probabilities [ROWS, BLOCK_T], zero in slots that do not count.

    ``b_lse`` is the log-sum-exp in base 2 of the rows [ROWS, 1], or of the tokens [1, BLOCK_T] if they are queries.
    """
    return tl.where(m_t[None, :], tl.exp2(b_s * scale_log2 - b_lse), 0.0)


def padded(head_dim: int) -> int:
    """The width of a tile: the next power of two of the head dimension, and at least the matrix units' minimum."""
    return max(16, triton.next_power_of_2(head_dim))


def mask_bytes(key_mask: Tensor | None) -> Tensor | None:
    """The key mask as contiguous bytes."""
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)
