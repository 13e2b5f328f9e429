"""The sampling step: ``prev = a x + b v + std noise``, and the log-probability of what is stored at every location."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.policy.arguments import SampleArguments
from star_kernels.policy.triton_latents import (
    LAUNCH,
    SIZES,
    add_channels,
    geometry,
    load_tile,
    load_transition,
    log_density,
    store_tile,
    strides,
    transition_mean,
)


@triton.jit(do_not_specialize=SIZES)
def sampling_kernel(
    p_v, p_x, p_noise, p_prev, p_table, p_log_prob,
    stride_vb, stride_vc, stride_vp, stride_xb, stride_xc, stride_xp, stride_nb, stride_nc, stride_np,
    stride_pb, stride_pc, stride_pp,
    channels, positions, tiles, columns, inverse_channels,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_C: tl.constexpr,
):  # fmt: skip
    positions, channels = positions // UNIT_P * UNIT_P, channels // UNIT_C * UNIT_C
    o_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < positions
    mean_sample, mean_output, std, scale, offset, _ = load_transition(p_table, columns, o_b, True)
    p_v += o_b * stride_vb
    p_x += o_b * stride_xb
    p_noise += o_b * stride_nb
    p_prev += o_b * stride_pb
    b_squares = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_tile = m_p[:, None] & (o_c < channels)[None, :]
        b_v = load_tile(p_v, stride_vc, stride_vp, o_p, o_c, m_tile)
        b_x = load_tile(p_x, stride_xc, stride_xp, o_p, o_c, m_tile)
        b_noise = load_tile(p_noise, stride_nc, stride_np, o_p, o_c, m_tile)
        b_mean = transition_mean(mean_sample, mean_output, b_x, b_v)
        b_prev = (b_mean + std * b_noise).to(p_prev.dtype.element_ty)
        store_tile(b_prev, p_prev, stride_pc, stride_pp, o_p, o_c, m_tile)
        b_residual = b_prev.to(tl.float32) - b_mean
        b_squares += b_residual * b_residual
    b_log_prob = log_density(add_channels(b_squares, BLOCK_P, BLOCK_C), scale, offset, inverse_channels)
    tl.store(p_log_prob + o_b * positions + o_p, b_log_prob, mask=m_p)


def sample_transition(arguments: SampleArguments, prev_sample: Tensor, log_prob: Tensor) -> None:
    """Writes prev_sample and log_prob, in one launch."""
    model_output, sample, noise, coefficients, channel_dim = arguments
    shape = geometry(model_output, channel_dim)
    latents = (model_output, sample, noise, prev_sample)
    steps = [stride for latent in latents for stride in strides(latent, channel_dim)]
    with torch.cuda.device_of(model_output):
        sampling_kernel[(shape.batch * shape.tiles,)](
            *latents, coefficients, log_prob, *steps,
            shape.channels, shape.positions, shape.tiles, coefficients.shape[1], 1.0 / shape.channels,
            **shape.constants, **LAUNCH,
        )  # fmt: skip
