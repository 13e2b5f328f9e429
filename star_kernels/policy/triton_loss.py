"""The clipped policy loss with a weight for each location, in one launch.

Advantages are [B], those of phrases [B, G] with weights [B, G, *grid], or dense [B, *locations]. The latents are read
once in each case. Advantages that share a ratio enter by two sums, of W max(A, 0) and of W max(-A, 0), over the phrases
of a location or over the locations of a sample.

Each program adds up the terms of its positions. The last program to finish adds up all programs in a fixed order, and
writes the loss, the metrics and the numbers saved for the backward pass, float32 [rows, B]: the slope
d loss / d log-ratio of each phrase, or for dense advantages of either sign (without the surrogate's own slope if
locations have ratios), and one over the number of locations that count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from star_kernels.counters import zero_counters
from star_kernels.policy.arguments import Forward, PolicyArguments
from star_kernels.policy.triton_latents import (
    BLOCK_B,
    BLOCK_T,
    LAUNCH,
    NUMBERS,
    SIZES,
    clamp_advantage,
    clipped_surrogate,
    geometry,
    grid_cells,
    inverse_count,
    last_to_arrive,
    load_mask,
    load_sums,
    load_transition,
    load_weights,
    masked_surrogate,
    reciprocal,
    signed_masked,
    signed_surrogates,
    store_sum,
    weighted,
)
from star_kernels.policy.triton_ratios import (
    channel_sums,
    kernel_arguments,
    kl_divergence,
    log_ratios,
    signed_advantages,
    single_phrase,
)

# Rows of the partial sums. Ratios of samples: a weighted log-ratio, or one per phrase in the rows from LOG_RATIO on, or
# with dense advantages one and the sums POSITIVE and NEGATIVE. Ratios of locations: the rows from LOSS on.
COUNT, KL, DIVERGENCE, LOG_RATIO, POSITIVE, NEGATIVE = (tl.constexpr(row) for row in range(6))
LOSS, RATIO, RATIO_MAX, CLIPPED, SQUARED = (tl.constexpr(row) for row in range(3, 8))
ROWS = 8


@triton.jit
def _finish(
    p_partial, p_old_log_prob, p_advantages, p_table, p_mask, p_step_weights, p_old, p_ref, p_loss, p_metrics, p_saved,
    batch, channels, positions, tiles, columns, phrases, old_is_scalar, unreduced,
    clip_low, clip_high, kl_mask_threshold, advantage_clip, kl_coef,
    PER_LOCATION: tl.constexpr, PHRASES: tl.constexpr, DENSE: tl.constexpr, KL_MASK: tl.constexpr,
):  # fmt: skip
    """Adds up all programs and writes the results, in float64 until the final rounding."""
    b_ratio_mean = tl.zeros([BLOCK_B], dtype=tl.float64)  # this and the next six: sums over the samples so far
    b_ratio_max, b_clip_fraction, b_approx_kl, b_policy_loss, b_kl_loss, b_divergence = (
        b_ratio_mean, b_ratio_mean, b_ratio_mean, b_ratio_mean, b_ratio_mean, b_ratio_mean,
    )  # fmt: skip
    share = reciprocal(batch.to(tl.float64))
    share_of_phrase = reciprocal(phrases.to(tl.float64))
    inverse_channels = reciprocal(channels.to(tl.float64))
    for b0 in range(0, batch, BLOCK_B):
        o_b = b0 + tl.arange(0, BLOCK_B)
        m_b = o_b < batch
        b_count = tl.zeros([BLOCK_B, BLOCK_T], dtype=tl.float64)
        b_kl, b_log_ratio, b_loss, b_ratio, b_max, b_clipped, b_squared, b_positive, b_negative, b_divergences = (
            b_count, b_count, b_count, b_count, b_count, b_count, b_count, b_count, b_count, b_count,
        )  # fmt: skip
        for t0 in range(0, tiles, BLOCK_T):
            o_t = t0 + tl.arange(0, BLOCK_T)
            m_tile = m_b[:, None] & (o_t < tiles)[None, :]
            p_tile = p_partial + o_b[:, None] * tiles + o_t[None, :]
            if p_mask is not None:
                b_count += load_sums(p_tile, COUNT, m_tile)
            if p_ref is not None:
                b_kl += load_sums(p_tile, KL, m_tile)
            if PER_LOCATION:
                b_loss += load_sums(p_tile, LOSS, m_tile)
                b_ratio += load_sums(p_tile, RATIO, m_tile)
                b_max = tl.maximum(b_max, load_sums(p_tile, RATIO_MAX, m_tile))
                b_clipped += load_sums(p_tile, CLIPPED, m_tile)
                b_squared += load_sums(p_tile, SQUARED, m_tile)
            elif not PHRASES:
                b_log_ratio += load_sums(p_tile, LOG_RATIO, m_tile)
            if KL_MASK:
                b_divergences += load_sums(p_tile, DIVERGENCE, m_tile)
            if DENSE and not PER_LOCATION:
                b_positive += load_sums(p_tile, POSITIVE, m_tile)
                b_negative += load_sums(p_tile, NEGATIVE, m_tile)
        b_inverse = inverse_count(b_count, positions, m_b, p_mask)
        if KL_MASK:
            b_sample_divergence = tl.sum(b_divergences, axis=1) * b_inverse
            b_diverged = b_sample_divergence >= kl_mask_threshold
            b_divergence += b_sample_divergence
        m_some = b_inverse > 0.0  # a sample without a location contributes nothing

        _, mean_output, std, scale, _, kl_scale = load_transition(p_table, columns, o_b, m_b)
        b_step = tl.full([BLOCK_B], 1.0, dtype=tl.float32)
        if p_step_weights is not None:
            b_step = tl.load(p_step_weights + o_b, mask=m_b, other=1.0)
        b_guard = tl.full([BLOCK_B], 1.0, dtype=tl.float64)
        if p_old is not None and not KL_MASK:
            b_guard = reciprocal(2.0 * scale.to(tl.float64) * std)
        b_slope = b_guard * b_step
        b_share = tl.where(unreduced != 0, 1.0, share)
        p_slope = p_saved + o_b
        if PER_LOCATION:
            b_sample_ratio = tl.sum(b_ratio, axis=1) * b_inverse
            b_sample_max = tl.max(b_max, axis=1)
            b_sample_clipped = tl.sum(b_clipped, axis=1) * b_inverse
            b_sample_squared = tl.sum(b_squared, axis=1) * b_inverse
            b_sample_loss = tl.sum(b_loss, axis=1) * b_inverse * b_step
            if PHRASES:
                for g in range(phrases):
                    tl.store(p_slope, b_slope * b_share, mask=m_b)
                    p_slope += batch
            else:
                tl.store(p_slope, b_slope * b_share, mask=m_b)
                p_slope += batch
                if DENSE:
                    tl.store(p_slope, b_slope * b_share, mask=m_b)
                    p_slope += batch
        elif PHRASES:
            b_sample_ratio = tl.zeros([BLOCK_B], dtype=tl.float64)
            b_sample_max, b_sample_clipped, b_sample_squared, b_sample_loss = (
                b_sample_ratio, b_sample_ratio, b_sample_ratio, b_sample_ratio,
            )  # fmt: skip
            for g in range(phrases):
                b_log_ratio = tl.zeros([BLOCK_B, BLOCK_T], dtype=tl.float64)
                for t0 in range(0, tiles, BLOCK_T):
                    o_t = t0 + tl.arange(0, BLOCK_T)
                    p_tile = p_partial + o_b[:, None] * tiles + o_t[None, :]
                    b_log_ratio += load_sums(p_tile, LOG_RATIO + g, m_b[:, None] & (o_t < tiles)[None, :])
                b_mean = tl.sum(b_log_ratio, axis=1) * b_inverse * b_guard
                b_advantage = tl.load(p_advantages + o_b * phrases + g, mask=m_b, other=0.0)
                b_advantage = clamp_advantage(b_advantage, advantage_clip)
                if KL_MASK:
                    b_rho, b_surrogate, b_surrogate_slope, b_outside = masked_surrogate(
                        b_mean.to(tl.float32), b_advantage, b_diverged
                    )
                else:
                    b_rho, b_surrogate, b_surrogate_slope, b_outside = clipped_surrogate(
                        b_mean.to(tl.float32), b_advantage, clip_low, clip_high
                    )
                b_phrase_ratio = tl.where(m_some, b_rho, 0.0)
                b_sample_ratio += b_phrase_ratio * share_of_phrase
                b_sample_max = tl.maximum(b_sample_max, tl.where(b_rho == b_rho, b_phrase_ratio, 0.0))
                b_sample_clipped += tl.where(m_some & b_outside, share_of_phrase, 0.0)
                b_sample_squared += tl.where(m_some, b_mean * b_mean, 0.0) * share_of_phrase
                b_sample_loss += tl.where(m_some, b_surrogate * b_step, 0.0)
                b_phrase_slope = tl.where(m_some, b_slope * b_surrogate_slope, 0.0)
                tl.store(p_slope, b_phrase_slope * b_share, mask=m_b)
                p_slope += batch
        else:
            b_old = tl.load(p_old_log_prob + o_b, mask=m_b & (old_is_scalar != 0), other=0.0)
            b_mean = (tl.sum(b_log_ratio, axis=1) * b_inverse - b_old) * b_guard
            # in float32, as the reference implementation's: what overflows there does so here
            b_log_rho = b_mean.to(tl.float32)
            if DENSE:
                b_mean_positive = (tl.sum(b_positive, axis=1) * b_inverse).to(tl.float32)
                b_mean_negative = (tl.sum(b_negative, axis=1) * b_inverse).to(tl.float32)
                if KL_MASK:
                    b_rho, b_surrogate, _, b_outside = signed_masked(
                        b_log_rho, b_mean_positive, b_mean_negative, b_diverged
                    )
                    _, _, b_surrogate_slope, _ = masked_surrogate(b_log_rho, 1.0, b_diverged)
                    _, _, b_negative_slope, _ = masked_surrogate(b_log_rho, -1.0, b_diverged)
                else:
                    b_rho, b_surrogate, _, b_outside = signed_surrogates(
                        b_log_rho, b_mean_positive, b_mean_negative, clip_low, clip_high
                    )
                    _, _, b_surrogate_slope, _ = clipped_surrogate(b_log_rho, 1.0, clip_low, clip_high)
                    _, _, b_negative_slope, _ = clipped_surrogate(b_log_rho, -1.0, clip_low, clip_high)
                b_negative_slope = tl.where(m_some, b_slope * b_negative_slope, 0.0)
                tl.store(p_slope + batch, b_negative_slope * b_share, mask=m_b)
            else:
                b_advantage = clamp_advantage(tl.load(p_advantages + o_b, mask=m_b, other=0.0), advantage_clip)
                if KL_MASK:
                    b_rho, b_surrogate, b_surrogate_slope, b_outside = masked_surrogate(
                        b_log_rho, b_advantage, b_diverged
                    )
                else:
                    b_rho, b_surrogate, b_surrogate_slope, b_outside = clipped_surrogate(
                        b_log_rho, b_advantage, clip_low, clip_high
                    )
            b_sample_ratio = tl.where(m_some, b_rho, 0.0)
            b_sample_max = tl.where(b_sample_ratio == b_sample_ratio, b_sample_ratio, 0.0)
            b_sample_clipped = tl.where(m_some & b_outside, 1.0, 0.0).to(tl.float64)
            b_sample_squared = tl.where(m_some, b_mean * b_mean, 0.0)
            b_sample_loss = tl.where(m_some, b_surrogate * b_step, 0.0)
            b_slope = tl.where(m_some, b_slope * b_surrogate_slope, 0.0)
            tl.store(p_slope, b_slope * b_share, mask=m_b)
            p_slope += 2 * batch if DENSE else batch
        tl.store(p_slope, b_inverse, mask=m_b)
        b_sample_kl = tl.zeros([BLOCK_B], dtype=tl.float64)
        if p_ref is not None:
            b_sample_kl = tl.sum(b_kl, axis=1) * b_inverse * inverse_channels * mean_output * mean_output * kl_scale

        tl.store(p_loss + o_b, b_sample_loss + kl_coef * b_sample_kl, mask=m_b & (unreduced != 0))
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
    # the maximum leaves NaN out, the mean does not
    tl.store(p_metrics + 1, tl.where(ratio_mean == ratio_mean, tl.max(b_ratio_max, axis=0), ratio_mean))
    tl.store(p_metrics + 2, tl.sum(b_clip_fraction, axis=0) * share)
    tl.store(p_metrics + 3, tl.sum(b_approx_kl, axis=0) * share)
    tl.store(p_metrics + 4, tl.sum(b_divergence, axis=0) * share)
    tl.store(p_metrics + 5, policy_loss)
    tl.store(p_metrics + 6, kl_loss)
    tl.store(p_loss, policy_loss + kl_coef * kl_loss, mask=unreduced == 0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=NUMBERS)
def policy_forward_kernel(
    p_v, p_x, p_prev, p_old, p_ref, p_old_log_prob, p_advantages, p_table, p_weights, p_mask, p_step_weights,
    p_partial, p_counter, p_loss, p_metrics, p_saved,
    stride_v_b, stride_v_c, stride_v_p, stride_x_b, stride_x_c, stride_x_p, stride_prev_b, stride_prev_c,
    stride_prev_p, stride_old_b, stride_old_c, stride_old_p, stride_ref_b, stride_ref_c, stride_ref_p,
    batch, channels, positions, tiles, columns, phrases, rows_of_location, columns_of_location, patch_frames,
    patch_rows, patch_columns, grid_rows, grid_columns, old_is_scalar, weighted_kl, unreduced,
    inverse_channels, clip_low, clip_high, kl_mask_threshold, advantage_clip, kl_coef,
    PER_LOCATION: tl.constexpr, PHRASES: tl.constexpr, DENSE: tl.constexpr, KL_MASK: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_C: tl.constexpr,
):  # fmt: skip
    positions, channels = positions // UNIT_P * UNIT_P, channels // UNIT_C * UNIT_C
    cells = positions // (patch_frames * patch_rows * patch_columns)
    o_b = (tl.program_id(0) // tiles).to(tl.int64)
    mean_sample, mean_output, std, scale, offset, _ = load_transition(p_table, columns, o_b, True)
    p_v += o_b * stride_v_b
    p_x += o_b * stride_x_b
    p_prev += o_b * stride_prev_b
    if p_old is not None:
        p_old += o_b * stride_old_b
    if p_ref is not None:
        p_ref += o_b * stride_ref_b
    o_g = tl.arange(0, BLOCK_G)
    b_phrases = tl.zeros([BLOCK_G], dtype=tl.float64)
    b_count = tl.zeros([BLOCK_P], dtype=tl.float32)
    b_first, b_ratio, b_max, b_clipped, b_squared, b_positives, b_negatives, b_divergences = (
        b_count, b_count, b_count, b_count, b_count, b_count, b_count, b_count,
    )  # fmt: skip
    b_kl = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for first in range(tl.program_id(0) % tiles * BLOCK_P, positions, tiles * BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        m_p = load_mask(p_mask, o_b, o_p, positions)
        o_cell = grid_cells(
            o_p, rows_of_location, columns_of_location, patch_frames, patch_rows, patch_columns, grid_rows, grid_columns
        )
        if PHRASES:  # whose weights do not act on the KL penalty
            b_weight = tl.full([BLOCK_P], 1.0, dtype=tl.float32)
        else:
            b_weight = load_weights(p_weights, o_b, o_cell, cells, o_p < positions)
        b_residuals, b_changes, b_differences = channel_sums(
            p_v, p_x, p_prev, p_old, p_ref,
            stride_v_c, stride_v_p, stride_x_c, stride_x_p, stride_prev_c, stride_prev_p, stride_old_c, stride_old_p,
            stride_ref_c, stride_ref_p, o_p, channels, positions, mean_sample, mean_output, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        b_log_ratio = log_ratios(
            b_residuals, b_changes, p_old, p_old_log_prob, o_b, o_p, positions, mean_output, std, scale, offset,
            inverse_channels, old_is_scalar, PER_LOCATION, KL_MASK,
        )  # fmt: skip
        if KL_MASK:
            b_divergence = kl_divergence(b_changes, mean_output, std, inverse_channels)
            b_diverged = b_divergence >= kl_mask_threshold
            b_divergences += tl.where(m_p, b_divergence, 0.0)
        b_count += tl.where(m_p, 1.0, 0.0)
        if p_ref is not None:
            b_kl_weight = tl.where(weighted_kl != 0, b_weight, 1.0)
            b_kl += tl.where(m_p[:, None], b_kl_weight[:, None] * b_differences, 0.0)
        if DENSE or (PHRASES and PER_LOCATION):
            b_positive, b_negative = signed_advantages(
                p_advantages, p_weights, o_b, o_p, o_cell, cells, positions, phrases, advantage_clip, DENSE
            )
        if PER_LOCATION:
            if PHRASES or DENSE:
                if KL_MASK:
                    b_rho, b_loss, _slope, b_outside = signed_masked(b_log_ratio, b_positive, b_negative, b_diverged)
                else:
                    b_rho, b_loss, _slope, b_outside = signed_surrogates(
                        b_log_ratio, b_positive, b_negative, clip_low, clip_high
                    )
            else:
                advantage = clamp_advantage(tl.load(p_advantages + o_b), advantage_clip)
                if KL_MASK:
                    b_rho, b_loss, _slope, b_outside = masked_surrogate(b_log_ratio, advantage, b_diverged)
                else:
                    b_rho, b_loss, _slope, b_outside = clipped_surrogate(b_log_ratio, advantage, clip_low, clip_high)
                b_loss = weighted(b_weight, b_loss)
            b_first += tl.where(m_p, b_loss, 0.0)
            b_ratio += tl.where(m_p, b_rho, 0.0)
            b_max = tl.maximum(b_max, tl.where(m_p & (b_rho == b_rho), b_rho, 0.0))
            b_clipped += tl.where(m_p & b_outside, 1.0, 0.0)
            b_squared += tl.where(m_p, b_log_ratio * b_log_ratio, 0.0)
        elif PHRASES:
            for g in range(phrases):
                b_weight = load_weights(p_weights, o_b * phrases + g, o_cell, cells, o_p < positions)
                b_terms = tl.where(m_p, b_weight * b_log_ratio, 0.0).to(tl.float64)
                b_phrases += tl.where(o_g == g, tl.sum(b_terms), 0.0)
        else:
            b_first += tl.where(m_p, b_weight * b_log_ratio, 0.0)
            if DENSE:
                b_positives += tl.where(m_p, b_positive, 0.0)
                b_negatives += tl.where(m_p, b_negative, 0.0)
    if p_mask is not None:
        store_sum(p_partial, COUNT, b_count)
    if p_ref is not None:
        store_sum(p_partial, KL, b_kl)
    if KL_MASK:
        store_sum(p_partial, DIVERGENCE, b_divergences.to(tl.float64))
    if PER_LOCATION:
        store_sum(p_partial, LOSS, b_first.to(tl.float64))
        store_sum(p_partial, RATIO, b_ratio.to(tl.float64))
        tl.store(p_partial + RATIO_MAX * tl.num_programs(0) + tl.program_id(0), tl.max(b_max, axis=0))
        store_sum(p_partial, CLIPPED, b_clipped)
        store_sum(p_partial, SQUARED, b_squared)
    elif PHRASES:
        p_phrases = p_partial + (LOG_RATIO + o_g) * tl.num_programs(0) + tl.program_id(0)
        tl.store(p_phrases, b_phrases, mask=o_g < phrases)
    else:
        store_sum(p_partial, LOG_RATIO, b_first.to(tl.float64))
        if DENSE:
            store_sum(p_partial, POSITIVE, b_positives.to(tl.float64))
            store_sum(p_partial, NEGATIVE, b_negatives.to(tl.float64))
    if last_to_arrive(p_counter):
        _finish(
            p_partial, p_old_log_prob, p_advantages, p_table, p_mask, p_step_weights, p_old, p_ref, p_loss, p_metrics,
            p_saved, batch, channels, positions, tiles, columns, phrases, old_is_scalar, unreduced,
            clip_low, clip_high, kl_mask_threshold, advantage_clip, kl_coef, PER_LOCATION, PHRASES, DENSE, KL_MASK,
        )  # fmt: skip


def policy_forward(arguments: PolicyArguments, results: Forward) -> None:
    """Writes loss, metrics and the numbers saved for the backward pass."""
    a = single_phrase(arguments)
    shape = geometry(a.model_output, a.channel_dim)
    tiles = shape.tiles_to_add
    programs = shape.batch * tiles
    rows = max(ROWS, LOG_RATIO.value + a.phrases)
    device = a.model_output.device
    with torch.cuda.device_of(a.model_output):
        policy_forward_kernel[(programs,)](
            **kernel_arguments(a, shape),
            p_step_weights=a.step_weights,
            p_partial=torch.empty(rows, programs, dtype=torch.float64, device=device),
            p_counter=zero_counters(device),
            p_loss=results.loss,
            p_metrics=results.metrics,
            p_saved=results.saved,
            tiles=tiles,
            old_is_scalar=int(a.old_log_prob.ndim == 1),
            kl_coef=float(a.kl_coef),
            BLOCK_G=triton.next_power_of_2(a.phrases),
            **LAUNCH,
        )
