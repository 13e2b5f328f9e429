"""The gradient of the clipped policy loss, in one launch.

It is recomputed from the inputs and the numbers that the forward pass saved for each sample, see triton_loss.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from star_kernels.policy.arguments import Backward, PolicyArguments
from star_kernels.policy.triton_latents import (
    LAUNCH,
    NUMBERS,
    SIZES,
    clamp_advantage,
    clipped_surrogate,
    geometry,
    grid_cells,
    latent_arguments,
    load_mask,
    load_tile,
    load_transition,
    load_weights,
    masked_surrogate,
    signed_masked,
    signed_surrogates,
    store_tile,
    transition_mean,
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


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=NUMBERS)
def policy_backward_kernel(
    p_v, p_x, p_prev, p_old, p_ref, p_grad, p_old_log_prob, p_advantages, p_table, p_weights, p_mask,
    p_grad_loss, p_saved,
    stride_v_b, stride_v_c, stride_v_p, stride_x_b, stride_x_c, stride_x_p, stride_prev_b, stride_prev_c,
    stride_prev_p, stride_old_b, stride_old_c, stride_old_p, stride_ref_b, stride_ref_c, stride_ref_p,
    stride_grad_b, stride_grad_c, stride_grad_p,
    batch, channels, positions, tiles, columns, phrases, rows_of_location, columns_of_location, patch_frames,
    patch_rows, patch_columns, grid_rows, grid_columns, weighted_kl, unreduced,
    inverse_channels, clip_low, clip_high, kl_mask_threshold, advantage_clip, kl_share,
    PER_LOCATION: tl.constexpr, PHRASES: tl.constexpr, DENSE: tl.constexpr, KL_MASK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_C: tl.constexpr,
):  # fmt: skip
    positions, channels = positions // UNIT_P * UNIT_P, channels // UNIT_C * UNIT_C
    cells = positions // (patch_frames * patch_rows * patch_columns)
    o_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = load_mask(p_mask, o_b, o_p, positions)
    mean_sample, mean_output, std, scale, offset, kl_scale = load_transition(p_table, columns, o_b, True)
    p_v += o_b * stride_v_b
    p_x += o_b * stride_x_b
    p_prev += o_b * stride_prev_b
    p_grad += o_b * stride_grad_b
    if p_old is not None:
        p_old += o_b * stride_old_b
    if p_ref is not None:
        p_ref += o_b * stride_ref_b
    o_cell = grid_cells(
        o_p, rows_of_location, columns_of_location, patch_frames, patch_rows, patch_columns, grid_rows, grid_columns
    )
    if PHRASES:  # whose weights do not act on the KL penalty
        b_weight = tl.full([BLOCK_P], 1.0, dtype=tl.float32)
        slopes = phrases
    else:
        b_weight = load_weights(p_weights, o_b, o_cell, cells, o_p < positions)
        slopes = 2 if DENSE else 1
    upstream = tl.load(p_grad_loss + tl.where(unreduced != 0, o_b, 0))
    mean = upstream * tl.load(p_saved + slopes * batch + o_b) * inverse_channels
    b_kl = tl.where(weighted_kl != 0, b_weight, 1.0) * (mean * kl_share * 2.0 * kl_scale * mean_output * mean_output)
    factor = mean * (2.0 * scale * mean_output)
    if PHRASES and not PER_LOCATION:
        b_factor = tl.zeros([BLOCK_P], dtype=tl.float32)
        for g in range(phrases):
            b_weight = load_weights(p_weights, o_b * phrases + g, o_cell, cells, o_p < positions)
            b_factor += b_weight * tl.load(p_saved + g * batch + o_b)
        b_factor *= factor
    elif PHRASES or DENSE:
        b_positive, b_negative = signed_advantages(
            p_advantages, p_weights, o_b, o_p, o_cell, cells, positions, phrases, advantage_clip, DENSE
        )
        if not PER_LOCATION:
            b_factor = weighted(b_positive, tl.load(p_saved + o_b))
            b_factor += weighted(b_negative, tl.load(p_saved + batch + o_b))
            b_factor *= factor
        else:
            factor *= tl.load(p_saved + o_b)
    else:
        b_factor = b_weight * (factor * tl.load(p_saved + o_b))
    if PER_LOCATION:
        b_residuals, b_changes, _ = channel_sums(
            p_v, p_x, p_prev, p_old, None,
            stride_v_c, stride_v_p, stride_x_c, stride_x_p, stride_prev_c, stride_prev_p, stride_old_c, stride_old_p,
            stride_ref_c, stride_ref_p, o_p, channels, positions, mean_sample, mean_output, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        b_log_ratio = log_ratios(
            b_residuals, b_changes, p_old, p_old_log_prob, o_b, o_p, positions, mean_output, std, scale, offset,
            inverse_channels, 0, True, KL_MASK,
        )  # fmt: skip
        if KL_MASK:
            b_diverged = kl_divergence(b_changes, mean_output, std, inverse_channels) >= kl_mask_threshold
        if PHRASES or DENSE:
            if KL_MASK:
                _, _, b_slope, _ = signed_masked(b_log_ratio, b_positive, b_negative, b_diverged)
            else:
                _, _, b_slope, _ = signed_surrogates(b_log_ratio, b_positive, b_negative, clip_low, clip_high)
            b_factor = b_slope * factor
        else:
            advantage = clamp_advantage(tl.load(p_advantages + o_b), advantage_clip)
            if KL_MASK:
                _, _, b_slope, _ = masked_surrogate(b_log_ratio, advantage, b_diverged)
            else:
                _, _, b_slope, _ = clipped_surrogate(b_log_ratio, advantage, clip_low, clip_high)
            b_factor = weighted(b_factor, b_slope)
    for c0 in range(0, channels, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_tile = (o_p < positions)[:, None] & (o_c < channels)[None, :]
        b_x = load_tile(p_x, stride_x_c, stride_x_p, o_p, o_c, m_tile)
        b_residual = load_tile(p_prev, stride_prev_c, stride_prev_p, o_p, o_c, m_tile)
        # GRPO-Guard: d/dv [scale b^2 (v - old)^2 - scale r^2] = 2 scale b r(old), the residual of the old output
        if p_old is not None and not KL_MASK:
            b_v = load_tile(p_old, stride_old_c, stride_old_p, o_p, o_c, m_tile)
        else:
            b_v = load_tile(p_v, stride_v_c, stride_v_p, o_p, o_c, m_tile)
        b_residual -= transition_mean(mean_sample, mean_output, b_x, b_v)
        b_grad = b_factor[:, None] * b_residual
        if p_ref is not None:
            b_difference = load_tile(p_v, stride_v_c, stride_v_p, o_p, o_c, m_tile)
            b_difference -= load_tile(p_ref, stride_ref_c, stride_ref_p, o_p, o_c, m_tile)
            b_grad += b_kl[:, None] * b_difference
        store_tile(tl.where(m_p[:, None], b_grad, 0.0), p_grad, stride_grad_c, stride_grad_p, o_p, o_c, m_tile)


def policy_backward(arguments: PolicyArguments, results: Backward) -> None:
    """Writes the gradient with respect to model_output."""
    a = single_phrase(arguments)
    shape = geometry(a.model_output, a.channel_dim)
    with torch.cuda.device_of(a.model_output):
        policy_backward_kernel[(shape.batch * shape.tiles,)](
            **kernel_arguments(a, shape),
            **latent_arguments(a.channel_dim, grad=results.gradient),
            p_grad_loss=results.grad_loss,
            p_saved=results.saved,
            tiles=shape.tiles,
            kl_share=a.kl_coef if a.unreduced else a.kl_coef / shape.batch,
            **LAUNCH,
        )
