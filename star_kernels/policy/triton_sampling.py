"""The sampling step: ``prev = a x + b v + std noise``, and the log-probability of the stored value per location."""

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
    latent_arguments,
    load_tile,
    load_transition,
    log_density,
    store_tile,
    transition_mean,
)


@triton.jit(do_not_specialize=SIZES)
def sampling_kernel(
    p_v, p_x, p_noise, p_prev, p_table, p_log_prob,
    stride_v_b, stride_v_c, stride_v_p, stride_x_b, stride_x_c, stride_x_p, stride_noise_b, stride_noise_c,
    stride_noise_p, stride_prev_b, stride_prev_c, stride_prev_p,
    channels, positions, tiles, columns, inverse_channels,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_C: tl.constexpr,
):  # fmt: skip
    positions, channels = positions // UNIT_P * UNIT_P, channels // UNIT_C * UNIT_C
    o_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < positions
    mean_sample, mean_output, std, scale, offset, _ = load_transition(p_table, columns, o_b, True)
    p_v += o_b * stride_v_b
    p_x += o_b * stride_x_b
    p_noise += o_b * stride_noise_b
    p_prev += o_b * stride_prev_b
    b_squares = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_tile = m_p[:, None] & (o_c < channels)[None, :]
        b_v = load_tile(p_v, stride_v_c, stride_v_p, o_p, o_c, m_tile)
        b_x = load_tile(p_x, stride_x_c, stride_x_p, o_p, o_c, m_tile)
        b_noise = load_tile(p_noise, stride_noise_c, stride_noise_p, o_p, o_c, m_tile)
        b_mean = transition_mean(mean_sample, mean_output, b_x, b_v)
        b_prev = (b_mean + std * b_noise).to(p_prev.dtype.element_ty)
        store_tile(b_prev, p_prev, stride_prev_c, stride_prev_p, o_p, o_c, m_tile)
        b_residual = b_prev.to(tl.float32) - b_mean
        b_squares += b_residual * b_residual
    b_log_prob = log_density(add_channels(b_squares, BLOCK_P, BLOCK_C), scale, offset, inverse_channels)
    tl.store(p_log_prob + o_b * positions + o_p, b_log_prob, mask=m_p)


def sample_transition(arguments: SampleArguments, prev_sample: Tensor, log_prob: Tensor) -> None:
    """Writes prev_sample and log_prob [B, *locations], in one launch."""
    a = arguments
    shape = geometry(a.model_output, a.channel_dim)
    with torch.cuda.device_of(a.model_output):
        sampling_kernel[(shape.batch * shape.tiles,)](
            **latent_arguments(a.channel_dim, v=a.model_output, x=a.sample, noise=a.noise, prev=prev_sample),
            p_table=a.coefficients,
            p_log_prob=log_prob,
            channels=shape.channels,
            positions=shape.positions,
            tiles=shape.tiles,
            columns=a.coefficients.shape[1],
            inverse_channels=1.0 / shape.channels,
            **shape.constants,
            **LAUNCH,
        )
