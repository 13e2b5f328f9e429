"""Code shared by the forward and the backward kernel of the clipped policy loss: log-ratios and advantages."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from star_kernels.policy.arguments import PolicyArguments
from star_kernels.policy.triton_latents import (
    Geometry,
    add_channels,
    clamp_advantage,
    latent_arguments,
    load_tile,
    load_weights,
    log_density,
    patch_arguments,
    transition_mean,
)


@triton.jit
def channel_sums(
    p_v, p_x, p_prev, p_old, p_ref,  # of this sample
    stride_v_c, stride_v_p, stride_x_c, stride_x_p, stride_prev_c, stride_prev_p, stride_old_c, stride_old_p,
    stride_ref_c, stride_ref_p, o_p, channels, positions, mean_sample, mean_output,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Squared residuals and changes from the old output, summed over channels [BLOCK_P]; squared differences from the
    reference model's output, summed over the tiles [BLOCK_P, BLOCK_C]."""
    b_residuals = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    b_changes = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    b_differences = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_tile = (o_p < positions)[:, None] & (o_c < channels)[None, :]
        b_v = load_tile(p_v, stride_v_c, stride_v_p, o_p, o_c, m_tile)
        b_x = load_tile(p_x, stride_x_c, stride_x_p, o_p, o_c, m_tile)
        b_residual = load_tile(p_prev, stride_prev_c, stride_prev_p, o_p, o_c, m_tile)
        b_residual -= transition_mean(mean_sample, mean_output, b_x, b_v)
        b_residuals += b_residual * b_residual
        if p_old is not None:
            b_change = b_v - load_tile(p_old, stride_old_c, stride_old_p, o_p, o_c, m_tile)
            b_changes += b_change * b_change
        if p_ref is not None:
            b_difference = b_v - load_tile(p_ref, stride_ref_c, stride_ref_p, o_p, o_c, m_tile)
            b_differences += b_difference * b_difference
    b_residual_sums = add_channels(b_residuals, BLOCK_P, BLOCK_C)
    b_change_sums = tl.zeros([BLOCK_P], dtype=tl.float32)
    if p_old is not None:
        b_change_sums = add_channels(b_changes, BLOCK_P, BLOCK_C)
    return b_residual_sums, b_change_sums, b_differences


@triton.jit
def log_ratios(
    b_residuals, b_changes, p_old, p_old_log_prob, o_b, o_p, positions, mean_output, std, scale, offset,
    inverse_channels, old_is_scalar, PER_LOCATION: tl.constexpr, KL_MASK: tl.constexpr,
):  # fmt: skip
    """Log-ratios [BLOCK_P], with GRPO-Guard's shift and, if they are those of locations, its factor."""
    m_old = (o_p < positions) & (old_is_scalar == 0)
    b_old = tl.load(p_old_log_prob + o_b * positions + o_p, mask=m_old, other=0.0)
    b_log_ratio = log_density(b_residuals, scale, offset, inverse_channels) - b_old
    if p_old is not None and not KL_MASK:
        b_log_ratio += scale * mean_output * mean_output * (b_changes * inverse_channels)
        if PER_LOCATION:
            b_log_ratio *= 1.0 / (2.0 * scale * std)
    return b_log_ratio


@triton.jit
def kl_divergence(b_changes, mean_output, std, inverse_channels):
    """The divergence from the old policy of each location [BLOCK_P], from the sum over channels of squared changes."""
    change = mean_output / std
    return 0.5 * change * change * (b_changes * inverse_channels)


@triton.jit
def signed_advantages(
    p_advantages, p_weights, o_b, o_p, o_cell, cells, positions, phrases, advantage_clip, DENSE: tl.constexpr
):
    """W max(A, 0) and W max(-A, 0) [BLOCK_P]: of the dense advantage of each location, or summed over phrases."""
    m_p = o_p < positions
    if DENSE:
        b_advantage = tl.load(p_advantages + o_b * positions + o_p, mask=m_p, other=0.0)
        b_advantage = clamp_advantage(b_advantage, advantage_clip)
        b_weight = load_weights(p_weights, o_b, o_cell, cells, m_p)
        b_positive, b_negative = b_weight * _positive_part(b_advantage), b_weight * _positive_part(-b_advantage)
    else:
        b_positive = tl.zeros(o_p.shape, dtype=tl.float32)
        b_negative = tl.zeros(o_p.shape, dtype=tl.float32)
        for g in range(phrases):
            b_weight = load_weights(p_weights, o_b * phrases + g, o_cell, cells, m_p)
            advantage = clamp_advantage(tl.load(p_advantages + o_b * phrases + g), advantage_clip)
            b_positive += b_weight * _positive_part(advantage)
            b_negative += b_weight * _positive_part(-advantage)
    return b_positive, b_negative


@triton.jit
def _positive_part(b_x):
    return tl.where(b_x < 0.0, 0.0, b_x)  # a NaN stays


def single_phrase(a: PolicyArguments) -> PolicyArguments:
    """The arguments, with advantages ``[B]`` if there is only one phrase."""
    if not a.has_phrases or a.phrases > 1:
        return a
    assert a.weights is not None
    return a._replace(advantages=a.advantages[:, 0], weights=a.weights[:, 0])


def kernel_arguments(a: PolicyArguments, shape: Geometry) -> dict[str, Any]:
    """The arguments, by name, that the forward and the backward kernel share."""
    grid = None if a.weights is None else tuple(a.weights.shape[2 if a.has_phrases else 1 :])
    return {
        **latent_arguments(
            a.channel_dim,
            v=a.model_output,
            x=a.sample,
            prev=a.prev_sample,
            old=a.old_model_output,
            ref=a.ref_model_output,
        ),
        "p_old_log_prob": a.old_log_prob,
        "p_advantages": a.advantages,
        "p_table": a.coefficients,
        "p_weights": a.weights,
        "p_mask": a.mask,
        "batch": shape.batch,
        "channels": shape.channels,
        "positions": shape.positions,
        "columns": a.coefficients.shape[1],
        "phrases": a.phrases,
        **patch_arguments(a.model_output, a.channel_dim, grid),
        "weighted_kl": int(a.weighted_kl),
        "unreduced": int(a.unreduced),
        "inverse_channels": 1.0 / shape.channels,
        "clip_low": float(a.clip_low),
        "clip_high": float(a.clip_high),
        "kl_mask_threshold": float(a.kl_mask_threshold),
        "advantage_clip": float(a.advantage_clip),
        "PER_LOCATION": a.per_location,
        "PHRASES": a.has_phrases,
        "DENSE": a.dense,
        "KL_MASK": a.kl_mask_threshold > 0,
        **shape.constants,
    }
