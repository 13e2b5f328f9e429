"""The clipped policy loss with a weight for each location, in one launch forward and one backward.

Each program adds up the terms of its positions; the last one to arrive adds up the programs, in a fixed order, and
writes the loss, the metrics and the statistics of each sample: d loss / d log-ratio (but for the surrogate's own slope
where locations have ratios), and one over the number of locations that count. The backward pass recomputes the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from star_kernels.policy.arguments import Backward, Forward, PolicyArguments
from star_kernels.policy.triton_latents import (
    BLOCK_B,
    BLOCK_T,
    LAUNCH,
    NUMBERS,
    SIZES,
    add_channels,
    clamp_advantage,
    clipped_surrogate,
    geometry,
    inverse_count,
    last_to_arrive,
    load_mask,
    load_sums,
    load_tile,
    load_transition,
    load_weights,
    log_density,
    patches,
    reciprocal,
    store_sum,
    store_tile,
    strides,
    transition_mean,
    zero_counter,
)

# Rows of the partial sums. A log-ratio is summed where samples have ratios; what follows it, where locations have.
COUNT, KL, LOG_RATIO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOSS, RATIO, RATIO_MAX, CLIPPED, SQUARED = (tl.constexpr(row) for row in range(2, 7))
ROWS = 7


@triton.jit
def _channel_sums(
    p_v, p_x, p_prev, p_old, p_ref,  # of this sample
    stride_vc, stride_vp, stride_xc, stride_xp, stride_pc, stride_pp, stride_oc, stride_op, stride_rc, stride_rp,
    o_p, channels, positions, mean_sample, mean_output,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
):  # fmt: skip
    """Squared residuals and changes from the old output, summed over channels [BLOCK_P]; squared differences from the
    reference's output, summed over the tiles [BLOCK_P, BLOCK_C]."""
    b_residuals = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    b_changes = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    b_differences = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_tile = (o_p < positions)[:, None] & (o_c < channels)[None, :]
        b_v = load_tile(p_v, stride_vc, stride_vp, o_p, o_c, m_tile)
        b_x = load_tile(p_x, stride_xc, stride_xp, o_p, o_c, m_tile)
        b_residual = load_tile(p_prev, stride_pc, stride_pp, o_p, o_c, m_tile)
        b_residual -= transition_mean(mean_sample, mean_output, b_x, b_v)
        b_residuals += b_residual * b_residual
        if HAS_OLD:
            b_change = b_v - load_tile(p_old, stride_oc, stride_op, o_p, o_c, m_tile)
            b_changes += b_change * b_change
        if HAS_REF:
            b_difference = b_v - load_tile(p_ref, stride_rc, stride_rp, o_p, o_c, m_tile)
            b_differences += b_difference * b_difference
    b_residual_sums = add_channels(b_residuals, BLOCK_P, BLOCK_C)
    b_change_sums = tl.zeros([BLOCK_P], dtype=tl.float32)
    if HAS_OLD:
        b_change_sums = add_channels(b_changes, BLOCK_P, BLOCK_C)
    return b_residual_sums, b_change_sums, b_differences


@triton.jit
def _log_ratios(
    b_residuals, b_changes, p_old_log_prob, o_b, o_p, positions, mean_output, std, scale, offset, inverse_channels,
    old_is_scalar, PER_LOCATION: tl.constexpr, HAS_OLD: tl.constexpr,
):  # fmt: skip
    """Log-ratios [BLOCK_P], with GRPO-Guard's shift and, where they are those of locations, its factor."""
    m_old = (o_p < positions) & (old_is_scalar == 0)
    b_old = tl.load(p_old_log_prob + o_b * positions + o_p, mask=m_old, other=0.0)
    b_log_ratio = log_density(b_residuals, scale, offset, inverse_channels) - b_old
    if HAS_OLD:
        b_log_ratio += scale * mean_output * mean_output * (b_changes * inverse_channels)
        if PER_LOCATION:
            b_log_ratio *= 1.0 / (2.0 * scale * std)
    return b_log_ratio


@triton.jit
def _finish(
    p_partial, p_old_log_prob, p_advantages, p_table, p_step_weights, p_loss, p_metrics, p_statistics,
    batch, channels, positions, tiles, columns, has_step_weights, old_is_scalar, per_sample,
    clip_low, clip_high, advantage_clip, kl_coef,
    PER_LOCATION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
):  # fmt: skip
    """Adds up all programs and writes the results, in float64 up to the last rounding."""
    b_ratio_mean = tl.zeros([BLOCK_B], dtype=tl.float64)  # this and its kin: sums over the samples so far
    b_ratio_max, b_clip_fraction, b_approx_kl, b_policy_loss, b_kl_loss = (
        b_ratio_mean, b_ratio_mean, b_ratio_mean, b_ratio_mean, b_ratio_mean,
    )  # fmt: skip
    share = reciprocal(batch.to(tl.float64))
    inverse_channels = reciprocal(channels.to(tl.float64))
    for b0 in range(0, batch, BLOCK_B):
        o_b = b0 + tl.arange(0, BLOCK_B)
        m_b = o_b < batch
        b_count = tl.zeros([BLOCK_B, BLOCK_T], dtype=tl.float64)
        b_kl, b_log_ratio, b_loss, b_ratio, b_max, b_clipped, b_squared = (
            b_count, b_count, b_count, b_count, b_count, b_count, b_count,
        )  # fmt: skip
        for t0 in range(0, tiles, BLOCK_T):
            o_t = t0 + tl.arange(0, BLOCK_T)
            m_tile = m_b[:, None] & (o_t < tiles)[None, :]
            p_tile = p_partial + o_b[:, None] * tiles + o_t[None, :]
            if HAS_MASK:
                b_count += load_sums(p_tile, COUNT, m_tile)
            if HAS_REF:
                b_kl += load_sums(p_tile, KL, m_tile)
            if PER_LOCATION:
                b_loss += load_sums(p_tile, LOSS, m_tile)
                b_ratio += load_sums(p_tile, RATIO, m_tile)
                b_max = tl.maximum(b_max, load_sums(p_tile, RATIO_MAX, m_tile))
                b_clipped += load_sums(p_tile, CLIPPED, m_tile)
                b_squared += load_sums(p_tile, SQUARED, m_tile)
            else:
                b_log_ratio += load_sums(p_tile, LOG_RATIO, m_tile)
        b_inverse = inverse_count(b_count, positions, m_b, HAS_MASK)

        _, mean_output, std, scale, _, kl_scale = load_transition(p_table, columns, o_b, m_b)
        b_step = tl.load(p_step_weights + o_b, mask=m_b & (has_step_weights != 0), other=1.0)
        b_guard = tl.full([BLOCK_B], 1.0, dtype=tl.float64)
        if HAS_OLD:
            b_guard = reciprocal(2.0 * scale.to(tl.float64) * std)
        b_slope = b_guard * b_step
        if PER_LOCATION:
            b_sample_ratio = tl.sum(b_ratio, axis=1) * b_inverse
            b_sample_max = tl.max(b_max, axis=1)
            b_sample_clipped = tl.sum(b_clipped, axis=1) * b_inverse
            b_sample_squared = tl.sum(b_squared, axis=1) * b_inverse
            b_sample_loss = tl.sum(b_loss, axis=1) * b_inverse * b_step
        else:
            b_old = tl.load(p_old_log_prob + o_b, mask=m_b & (old_is_scalar != 0), other=0.0)
            b_mean = (tl.sum(b_log_ratio, axis=1) * b_inverse - b_old) * b_guard
            b_advantage = clamp_advantage(tl.load(p_advantages + o_b, mask=m_b, other=0.0), advantage_clip)
            # in float32, as the definition's: what overflows there does so here
            b_rho, b_surrogate, b_surrogate_slope, b_outside = clipped_surrogate(
                b_mean.to(tl.float32), b_advantage, clip_low, clip_high
            )
            m_some = b_inverse > 0.0  # a sample without a location contributes nothing
            b_sample_ratio = tl.where(m_some, b_rho, 0.0)
            b_sample_max = tl.where(b_sample_ratio == b_sample_ratio, b_sample_ratio, 0.0)
            b_sample_clipped = tl.where(m_some & b_outside, 1.0, 0.0).to(tl.float64)
            b_sample_squared = tl.where(m_some, b_mean * b_mean, 0.0)
            b_sample_loss = tl.where(m_some, b_surrogate * b_step, 0.0)
            b_slope = tl.where(m_some, b_slope * b_surrogate_slope, 0.0)
        b_sample_kl = tl.sum(b_kl, axis=1) * b_inverse * inverse_channels * mean_output * mean_output * kl_scale
        if not HAS_REF:
            b_sample_kl = tl.zeros([BLOCK_B], dtype=tl.float64)

        p_statistic = p_statistics + o_b
        tl.store(p_statistic, b_slope * tl.where(per_sample != 0, 1.0, share), mask=m_b)
        tl.store(p_statistic + batch, b_inverse, mask=m_b)
        tl.store(p_loss + o_b, b_sample_loss + kl_coef * b_sample_kl, mask=m_b & (per_sample != 0))
        b_ratio_mean += b_sample_ratio
        b_ratio_max = tl.maximum(b_ratio_max, b_sample_max)
        b_clip_fraction += b_sample_clipped
        b_approx_kl += 0.5 * b_sample_squared
        b_policy_loss += b_sample_loss
        b_kl_loss += b_sample_kl

    ratio_mean = tl.sum(b_ratio_mean, axis=0) * share
    policy_loss = tl.sum(b_policy_loss, axis=0) * share
    kl_loss = tl.sum(b_kl_loss, axis=0) * share
    tl.store(p_metrics, ratio_mean)
    # no maximum was taken of a NaN, which the mean has kept
    tl.store(p_metrics + 1, tl.where(ratio_mean == ratio_mean, tl.max(b_ratio_max, axis=0), ratio_mean))
    tl.store(p_metrics + 2, tl.sum(b_clip_fraction, axis=0) * share)
    tl.store(p_metrics + 3, tl.sum(b_approx_kl, axis=0) * share)
    tl.store(p_metrics + 4, policy_loss)
    tl.store(p_metrics + 5, kl_loss)
    tl.store(p_loss, policy_loss + kl_coef * kl_loss, mask=per_sample == 0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=NUMBERS)
def policy_forward_kernel(
    p_v, p_x, p_prev, p_old, p_ref, p_old_log_prob, p_advantages, p_table, p_weights, p_mask, p_step_weights,
    p_partial, p_counter, p_loss, p_metrics, p_statistics,
    stride_vb, stride_vc, stride_vp, stride_xb, stride_xc, stride_xp, stride_pb, stride_pc, stride_pp,
    stride_ob, stride_oc, stride_op, stride_rb, stride_rc, stride_rp,
    batch, channels, positions, tiles, columns, rows_of_location, columns_of_location, patch_frames, patch_rows,
    patch_columns, grid_rows, grid_columns, has_weights, has_step_weights, old_is_scalar, weighted_kl, per_sample,
    inverse_channels, clip_low, clip_high, advantage_clip, kl_coef,
    PER_LOCATION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_C: tl.constexpr,
):  # fmt: skip
    positions, channels = positions // UNIT_P * UNIT_P, channels // UNIT_C * UNIT_C
    o_b = (tl.program_id(0) // tiles).to(tl.int64)
    mean_sample, mean_output, std, scale, offset, _ = load_transition(p_table, columns, o_b, True)
    advantage = clamp_advantage(tl.load(p_advantages + o_b), advantage_clip)
    p_v += o_b * stride_vb
    p_x += o_b * stride_xb
    p_prev += o_b * stride_pb
    p_old += o_b * stride_ob
    p_ref += o_b * stride_rb
    b_count = tl.zeros([BLOCK_P], dtype=tl.float32)
    b_first, b_ratio, b_max, b_clipped, b_squared = b_count, b_count, b_count, b_count, b_count
    b_kl = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for first in range(tl.program_id(0) % tiles * BLOCK_P, positions, tiles * BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        m_p = load_mask(p_mask, o_b, o_p, positions, HAS_MASK)
        b_weight = load_weights(
            p_weights, o_b, o_p, positions, rows_of_location, columns_of_location, patch_frames, patch_rows,
            patch_columns, grid_rows, grid_columns, has_weights,
        )  # fmt: skip
        b_residuals, b_changes, b_differences = _channel_sums(
            p_v, p_x, p_prev, p_old, p_ref,
            stride_vc, stride_vp, stride_xc, stride_xp, stride_pc, stride_pp, stride_oc, stride_op, stride_rc,
            stride_rp, o_p, channels, positions, mean_sample, mean_output, BLOCK_P, BLOCK_C, HAS_OLD, HAS_REF,
        )  # fmt: skip
        b_log_ratio = _log_ratios(
            b_residuals, b_changes, p_old_log_prob, o_b, o_p, positions, mean_output, std, scale, offset,
            inverse_channels, old_is_scalar, PER_LOCATION, HAS_OLD,
        )  # fmt: skip
        b_count += tl.where(m_p, 1.0, 0.0)
        if HAS_REF:
            b_kl_weight = tl.where(weighted_kl != 0, b_weight, 1.0)
            b_kl += tl.where(m_p[:, None], b_kl_weight[:, None] * b_differences, 0.0)
        if PER_LOCATION:
            b_rho, b_loss, _slope, b_outside = clipped_surrogate(b_log_ratio, advantage, clip_low, clip_high)
            b_first += tl.where(m_p, b_weight * b_loss, 0.0)
            b_ratio += tl.where(m_p, b_rho, 0.0)
            b_max = tl.maximum(b_max, tl.where(m_p & (b_rho == b_rho), b_rho, 0.0))
            b_clipped += tl.where(m_p & b_outside, 1.0, 0.0)
            b_squared += tl.where(m_p, b_log_ratio * b_log_ratio, 0.0)
        else:
            b_first += tl.where(m_p, b_weight * b_log_ratio, 0.0)
    if HAS_MASK:
        store_sum(p_partial, COUNT, b_count)
    if HAS_REF:
        store_sum(p_partial, KL, b_kl)
    if PER_LOCATION:
        store_sum(p_partial, LOSS, b_first.to(tl.float64))
        store_sum(p_partial, RATIO, b_ratio.to(tl.float64))
        tl.store(p_partial + RATIO_MAX * tl.num_programs(0) + tl.program_id(0), tl.max(b_max, axis=0))
        store_sum(p_partial, CLIPPED, b_clipped)
        store_sum(p_partial, SQUARED, b_squared)
    else:
        store_sum(p_partial, LOG_RATIO, b_first.to(tl.float64))
    if last_to_arrive(p_counter):
        _finish(
            p_partial, p_old_log_prob, p_advantages, p_table, p_step_weights, p_loss, p_metrics, p_statistics,
            batch, channels, positions, tiles, columns, has_step_weights, old_is_scalar, per_sample,
            clip_low, clip_high, advantage_clip, kl_coef, PER_LOCATION, HAS_MASK, HAS_OLD, HAS_REF,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=NUMBERS)
def policy_backward_kernel(
    p_v, p_x, p_prev, p_old, p_ref, p_grad, p_old_log_prob, p_advantages, p_table, p_weights, p_mask,
    p_grad_loss, p_statistics,
    stride_vb, stride_vc, stride_vp, stride_xb, stride_xc, stride_xp, stride_pb, stride_pc, stride_pp,
    stride_ob, stride_oc, stride_op, stride_rb, stride_rc, stride_rp, stride_gb, stride_gc, stride_gp,
    batch, channels, positions, tiles, columns, rows_of_location, columns_of_location, patch_frames, patch_rows,
    patch_columns, grid_rows, grid_columns, has_weights, weighted_kl, per_sample,
    inverse_channels, clip_low, clip_high, advantage_clip, kl_share,
    PER_LOCATION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_C: tl.constexpr,
):  # fmt: skip
    positions, channels = positions // UNIT_P * UNIT_P, channels // UNIT_C * UNIT_C
    o_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = load_mask(p_mask, o_b, o_p, positions, HAS_MASK)
    mean_sample, mean_output, std, scale, offset, kl_scale = load_transition(p_table, columns, o_b, True)
    p_v += o_b * stride_vb
    p_x += o_b * stride_xb
    p_prev += o_b * stride_pb
    p_old += o_b * stride_ob
    p_ref += o_b * stride_rb
    p_grad += o_b * stride_gb
    b_weight = load_weights(
        p_weights, o_b, o_p, positions, rows_of_location, columns_of_location, patch_frames, patch_rows,
        patch_columns, grid_rows, grid_columns, has_weights,
    )  # fmt: skip
    upstream = tl.load(p_grad_loss + tl.where(per_sample != 0, o_b, 0))
    mean = upstream * tl.load(p_statistics + batch + o_b) * inverse_channels
    b_factor = b_weight * (mean * (2.0 * scale * mean_output) * tl.load(p_statistics + o_b))
    b_kl = tl.where(weighted_kl != 0, b_weight, 1.0) * (mean * kl_share * 2.0 * kl_scale * mean_output * mean_output)
    if PER_LOCATION:
        b_residuals, b_changes, _ = _channel_sums(
            p_v, p_x, p_prev, p_old, p_ref,
            stride_vc, stride_vp, stride_xc, stride_xp, stride_pc, stride_pp, stride_oc, stride_op, stride_rc,
            stride_rp, o_p, channels, positions, mean_sample, mean_output, BLOCK_P, BLOCK_C, HAS_OLD, False,
        )  # fmt: skip
        b_log_ratio = _log_ratios(
            b_residuals, b_changes, p_old_log_prob, o_b, o_p, positions, mean_output, std, scale, offset,
            inverse_channels, 0, True, HAS_OLD,
        )  # fmt: skip
        advantage = clamp_advantage(tl.load(p_advantages + o_b), advantage_clip)
        _, _, b_slope, _ = clipped_surrogate(b_log_ratio, advantage, clip_low, clip_high)
        b_factor *= b_slope
    for c0 in range(0, channels, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_tile = (o_p < positions)[:, None] & (o_c < channels)[None, :]
        b_x = load_tile(p_x, stride_xc, stride_xp, o_p, o_c, m_tile)
        b_residual = load_tile(p_prev, stride_pc, stride_pp, o_p, o_c, m_tile)
        # GRPO-Guard: d/dv [scale b^2 (v - old)^2 - scale r^2] = 2 scale b r(old), the residual of the old output
        if HAS_OLD:
            b_v = load_tile(p_old, stride_oc, stride_op, o_p, o_c, m_tile)
        else:
            b_v = load_tile(p_v, stride_vc, stride_vp, o_p, o_c, m_tile)
        b_residual -= transition_mean(mean_sample, mean_output, b_x, b_v)
        b_grad = b_factor[:, None] * b_residual
        if HAS_REF:
            b_difference = load_tile(p_v, stride_vc, stride_vp, o_p, o_c, m_tile)
            b_difference -= load_tile(p_ref, stride_rc, stride_rp, o_p, o_c, m_tile)
            b_grad += b_kl[:, None] * b_difference
        store_tile(tl.where(m_p[:, None], b_grad, 0.0), p_grad, stride_gc, stride_gp, o_p, o_c, m_tile)


def policy_forward(arguments: PolicyArguments, results: Forward) -> None:
    """Writes the loss, the metrics and what the backward pass needs."""
    a = arguments
    if a.phrases > 1 or a.dense:
        raise NotImplementedError("advantages of phrases or of locations")
    loss, metrics, statistics = results
    shape = geometry(a.model_output, a.channel_dim)
    old, reference = (a.model_output if t is None else t for t in (a.old_model_output, a.ref_model_output))
    latents = (a.model_output, a.sample, a.prev_sample, old, reference)
    steps = [stride for latent in latents for stride in strides(latent, a.channel_dim)]
    tiles = shape.tiles_to_add
    programs = shape.batch * tiles
    with torch.cuda.device_of(a.model_output):
        partial = torch.empty(ROWS, programs, dtype=torch.float64, device=a.model_output.device)
        policy_forward_kernel[(programs,)](
            *latents, a.old_log_prob, a.advantages, a.coefficients, a.advantages if a.weights is None else a.weights,
            a.mask, a.advantages if a.step_weights is None else a.step_weights,
            partial, zero_counter(a.model_output.device), loss, metrics, statistics, *steps,
            shape.batch, shape.channels, shape.positions, tiles, a.coefficients.shape[1],
            *patches(a.model_output, a.channel_dim, a.weights), int(a.weights is not None),
            int(a.step_weights is not None), int(a.old_log_prob.ndim == 1), int(a.weighted_kl), int(a.unreduced),
            1.0 / shape.channels, float(a.clip_low), float(a.clip_high), float(a.advantage_clip), float(a.kl_coef),
            PER_LOCATION=a.per_location, HAS_MASK=a.mask is not None, HAS_OLD=a.old_model_output is not None,
            HAS_REF=a.ref_model_output is not None, **shape.constants, **LAUNCH,
        )  # fmt: skip


def policy_backward(arguments: PolicyArguments, results: Backward) -> None:
    """Writes the gradient with respect to model_output."""
    a = arguments
    if a.phrases > 1 or a.dense:
        raise NotImplementedError("advantages of phrases or of locations")
    grad_loss, statistics, gradient = results
    shape = geometry(a.model_output, a.channel_dim)
    old, reference = (a.model_output if t is None else t for t in (a.old_model_output, a.ref_model_output))
    latents = (a.model_output, a.sample, a.prev_sample, old, reference, gradient)
    steps = [stride for latent in latents for stride in strides(latent, a.channel_dim)]
    with torch.cuda.device_of(a.model_output):
        policy_backward_kernel[(shape.batch * shape.tiles,)](
            *latents, a.old_log_prob, a.advantages, a.coefficients, a.advantages if a.weights is None else a.weights,
            a.mask, grad_loss, statistics, *steps,
            shape.batch, shape.channels, shape.positions, shape.tiles, a.coefficients.shape[1],
            *patches(a.model_output, a.channel_dim, a.weights), int(a.weights is not None),
            int(a.weighted_kl), int(a.unreduced), 1.0 / shape.channels, float(a.clip_low), float(a.clip_high), float(a.advantage_clip),
            a.kl_coef if a.unreduced else a.kl_coef / shape.batch,
            PER_LOCATION=a.per_location, HAS_MASK=a.mask is not None, HAS_OLD=a.old_model_output is not None,
            HAS_REF=a.ref_model_output is not None, **shape.constants, **LAUNCH,
        )  # fmt: skip
