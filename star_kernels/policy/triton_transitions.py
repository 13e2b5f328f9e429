"""The coefficients of a transition on a GPU, in one launch: the formulas of transitions.py, in float64."""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.policy import transitions

FLOW_SDE, FLOW_CPS, FLOW_MATCHING = (
    tl.constexpr(formula) for formula in (transitions.FLOW_SDE, transitions.FLOW_CPS, transitions.FLOW_MATCHING)
)
LOG_SQRT_2PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))
BLOCK = 64
POINTERS = ("p_sigma", "p_next", "p_other")  # often an element of a schedule
SIZES = ("stride_sigma", "stride_next", "stride_other", "columns")
NUMBERS = ("sigma", "sigma_next", "other", "level", "kept")
LAUNCH = {"num_warps": 1, "enable_fp_fusion": False}


@triton.jit
def wide_number(bits):
    """A number that is passed by its bits, as Triton passes floats in float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def load_values(p, stride, number, o_b):
    """[BLOCK] in float64: the elements of a tensor, or a number for all columns."""
    if p is None:
        b_values = tl.zeros_like(o_b).to(tl.float64) + wide_number(number)
    else:
        b_values = tl.load(p + o_b * stride).to(tl.float64)
    return b_values


@triton.jit(do_not_specialize=(*SIZES, *NUMBERS), do_not_specialize_on_alignment=POINTERS)
def transition_kernel(
    p_sigma, p_next, p_other, p_table, sigma, sigma_next, other, level, kept, stride_sigma, stride_next, stride_other,
    columns, FORMULA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_b = tl.minimum(o_b, columns - 1)  # the last column is computed, and written, by all lanes that are left
    b_sigma = load_values(p_sigma, stride_sigma, sigma, o_b)
    b_next = load_values(p_next, stride_next, sigma_next, o_b)
    b_other = load_values(p_other, stride_other, other, o_b)
    b_level = tl.zeros_like(b_sigma) + wide_number(level)
    b_zero = tl.zeros_like(b_sigma)
    b_one = b_zero + 1.0
    if FORMULA == FLOW_MATCHING:
        b_mean_sample, b_mean_output, b_std = b_zero, b_one, 1.0 / tl.sqrt(2.0 * b_other)
        b_scale, b_offset, b_kl_scale = b_other, b_zero, b_other
    elif FORMULA == FLOW_CPS:  # level and kept: the sine and the cosine of noise_level pi / 2
        b_s, b_kept = b_next * b_level, b_next * wide_number(kept)
        b_mean_sample, b_std = 1.0 - b_next + b_kept, b_s
        b_mean_output = (1.0 - b_sigma) * b_kept - b_sigma * (1.0 - b_next)
        b_scale, b_offset, b_kl_scale = b_one, b_zero, 0.5 / (b_s * b_s)
    else:
        b_s = b_level
        if FORMULA == FLOW_SDE:
            b_s = b_level * tl.sqrt(b_sigma / (1.0 - tl.where(b_sigma == 1.0, b_other, b_sigma)))
        b_dt = b_next - b_sigma
        b_std = b_s * tl.sqrt(-b_dt)
        b_drift = b_s * b_s / (2.0 * b_sigma)
        b_mean_sample = 1.0 + b_drift * b_dt
        b_mean_output = (1.0 + b_drift * (1.0 - b_sigma)) * b_dt
        b_scale, b_offset, b_kl_scale = 0.5 / (b_std * b_std), -tl.log(b_std) - LOG_SQRT_2PI, 0.5 / (b_s * b_s)
    p_table += o_b
    tl.store(p_table, b_mean_sample.to(tl.float32))
    tl.store(p_table + columns, b_mean_output.to(tl.float32))
    tl.store(p_table + 2 * columns, b_std.to(tl.float32))
    tl.store(p_table + 3 * columns, b_scale.to(tl.float32))
    tl.store(p_table + 4 * columns, b_offset.to(tl.float32))
    tl.store(p_table + 5 * columns, b_kl_scale.to(tl.float32))


def transition(
    table: Tensor,
    formula: int,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    other: Tensor | float,
    level: float,
) -> None:
    """Writes table [6, B]. Tensors are [], [1] or [B], on its device; ``other`` is sigma_max or the weight."""
    angle = level * math.pi / 2
    level, kept = (math.sin(angle), math.cos(angle)) if formula == transitions.FLOW_CPS else (level, 0.0)
    pointers = [value if isinstance(value, Tensor) else None for value in (sigma, sigma_next, other)]
    strides = [0 if p is None or p.numel() == 1 else p.stride(0) for p in pointers]
    numbers = [0.0 if isinstance(value, Tensor) else value for value in (sigma, sigma_next, other)]
    with torch.cuda.device_of(table):
        transition_kernel[(triton.cdiv(table.shape[1], BLOCK),)](
            **dict(zip(POINTERS, pointers, strict=True)),
            p_table=table,
            **dict(zip(NUMBERS, map(_bits, (*numbers, level, kept)), strict=True)),
            **dict(zip(SIZES, (*strides, table.shape[1]), strict=True)),
            FORMULA=formula,
            BLOCK=BLOCK,
            **LAUNCH,
        )


def _bits(number: float) -> int:
    return struct.unpack("q", struct.pack("d", number))[0]
