"""DiffusionNFT's loss (arXiv 2509.16117) with a weight for each location, in one launch forward and one backward.

With D = old - target and d = output - old, the implicit policies' errors are D + beta d and D - beta d. The loss of a
sample is clip / beta * (r S+ f+ + (1 - r) S- f-), S the weighted mean squares and f = 1, or, with the adaptive
weighting, sigma^2 / max(sigma mean |error|, 1e-5), which has no gradient. The gradient is a combination of D and d; the
forward pass saves both factors for each sample, and one over the number of locations that count.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from star_kernels.counters import zero_counters
from star_kernels.policy import naive
from star_kernels.policy.arguments import Backward, Forward, NftArguments
from star_kernels.policy.triton_latents import (
    BLOCK_B,
    BLOCK_T,
    LAUNCH,
    NUMBERS,
    SIZES,
    Geometry,
    clamp_advantage,
    geometry,
    grid_cells,
    inverse_count,
    last_to_arrive,
    latent_arguments,
    load_mask,
    load_sums,
    load_tile,
    load_weights,
    patch_arguments,
    reciprocal,
    store_sum,
    store_tile,
)

# Rows of the partial sums. Squares of both errors are weighted; absolute errors and the squared change are not.
COUNT, KL, POSITIVE, NEGATIVE, POSITIVE_ABSOLUTE, NEGATIVE_ABSOLUTE, DEVIATION = map(tl.constexpr, range(7))
ROWS = 7
LEAST_ERROR = tl.constexpr(naive.LEAST_ERROR)


@triton.jit
def _finish(
    p_partial, p_advantages, p_sigma, p_mask, p_step_weights, p_ref, p_loss, p_metrics, p_saved,
    batch, channels, positions, tiles, adaptive, unreduced, beta, advantage_clip, kl_coef,
):  # fmt: skip
    """Adds up all programs and writes the results, in float64 until the final rounding."""
    b_zero = tl.zeros([BLOCK_B], dtype=tl.float64)
    b_positive_loss, b_negative_loss, b_mean_deviation, b_policy_loss, b_kl_loss = (
        b_zero, b_zero, b_zero, b_zero, b_zero,
    )  # fmt: skip
    share = reciprocal(batch.to(tl.float64))
    inverse_channels, inverse_beta = reciprocal(channels.to(tl.float64)), reciprocal(tl.cast(beta, tl.float64))
    inverse_clip = reciprocal(tl.cast(advantage_clip, tl.float64))
    for b0 in range(0, batch, BLOCK_B):
        o_b = b0 + tl.arange(0, BLOCK_B)
        m_b = o_b < batch
        b_count = tl.zeros([BLOCK_B, BLOCK_T], dtype=tl.float64)
        b_kl, b_positive, b_negative, b_positive_absolute, b_negative_absolute, b_deviation = (
            b_count, b_count, b_count, b_count, b_count, b_count,
        )  # fmt: skip
        for t0 in range(0, tiles, BLOCK_T):
            o_t = t0 + tl.arange(0, BLOCK_T)
            m_tile = m_b[:, None] & (o_t < tiles)[None, :]
            p_tile = p_partial + o_b[:, None] * tiles + o_t[None, :]
            if p_mask is not None:
                b_count += load_sums(p_tile, COUNT, m_tile)
            if p_ref is not None:
                b_kl += load_sums(p_tile, KL, m_tile)
            b_positive += load_sums(p_tile, POSITIVE, m_tile)
            b_negative += load_sums(p_tile, NEGATIVE, m_tile)
            b_positive_absolute += load_sums(p_tile, POSITIVE_ABSOLUTE, m_tile)
            b_negative_absolute += load_sums(p_tile, NEGATIVE_ABSOLUTE, m_tile)
            b_deviation += load_sums(p_tile, DEVIATION, m_tile)
        b_inverse = inverse_count(b_count, positions, m_b, p_mask)
        b_mean = b_inverse * inverse_channels  # of all elements that count

        b_step = tl.full([BLOCK_B], 1.0, dtype=tl.float64)
        if p_step_weights is not None:
            b_step = tl.load(p_step_weights + o_b, mask=m_b, other=1.0).to(tl.float64)
        b_sigma = tl.load(p_sigma + o_b, mask=m_b, other=1.0).to(tl.float64)
        b_f_positive = _weighting(tl.sum(b_positive_absolute, axis=1) * b_mean, b_sigma, adaptive)
        b_f_negative = _weighting(tl.sum(b_negative_absolute, axis=1) * b_mean, b_sigma, adaptive)
        b_advantage = clamp_advantage(tl.load(p_advantages + o_b, mask=m_b, other=0.0), advantage_clip)
        b_likely = 0.5 * b_advantage * inverse_clip + 0.5
        b_sample_positive = b_f_positive * (tl.sum(b_positive, axis=1) * b_mean)
        b_sample_negative = b_f_negative * (tl.sum(b_negative, axis=1) * b_mean)
        b_factor = b_step * advantage_clip
        b_sample_loss = b_factor * inverse_beta * (b_likely * b_sample_positive + (1.0 - b_likely) * b_sample_negative)
        b_sample_kl = tl.sum(b_kl, axis=1) * b_mean

        b_scale = 2.0 * b_factor * b_mean * tl.where(unreduced != 0, 1.0, share)
        b_for, b_against = b_likely * b_f_positive, (1.0 - b_likely) * b_f_negative
        tl.store(p_saved + o_b, b_scale * (b_for - b_against), mask=m_b)
        tl.store(p_saved + batch + o_b, b_scale * (b_for + b_against) * beta, mask=m_b)
        tl.store(p_saved + 2 * batch + o_b, b_inverse, mask=m_b)
        tl.store(p_loss + o_b, b_sample_loss + kl_coef * b_sample_kl, mask=m_b & (unreduced != 0))
        b_positive_loss += b_sample_positive
        b_negative_loss += b_sample_negative
        b_mean_deviation += tl.sum(b_deviation, axis=1) * b_mean
        b_policy_loss += b_sample_loss
        b_kl_loss += b_sample_kl

    policy_loss = tl.sum(b_policy_loss, axis=0) * share
    kl_loss = tl.sum(b_kl_loss, axis=0) * share
    tl.store(p_metrics, tl.sum(b_positive_loss, axis=0) * share)
    tl.store(p_metrics + 1, tl.sum(b_negative_loss, axis=0) * share)
    tl.store(p_metrics + 2, tl.sum(b_mean_deviation, axis=0) * share)
    tl.store(p_metrics + 3, policy_loss)
    tl.store(p_metrics + 4, kl_loss)
    tl.store(p_loss, policy_loss + kl_coef * kl_loss, mask=unreduced == 0)


@triton.jit
def _weighting(b_absolute, b_sigma, adaptive):
    """The factor f of a mean square, from the mean absolute error of the velocity."""
    b_error = b_sigma * b_absolute
    b_error = tl.where(b_error < LEAST_ERROR, LEAST_ERROR, b_error)  # a NaN stays
    return tl.where(adaptive != 0, b_sigma * b_sigma * reciprocal(b_error), 1.0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=NUMBERS)
def nft_forward_kernel(
    p_v, p_old, p_target, p_ref, p_advantages, p_sigma, p_weights, p_mask, p_step_weights,
    p_partial, p_counter, p_loss, p_metrics, p_saved,
    stride_v_b, stride_v_c, stride_v_p, stride_old_b, stride_old_c, stride_old_p, stride_target_b, stride_target_c,
    stride_target_p, stride_ref_b, stride_ref_c, stride_ref_p,
    batch, channels, positions, tiles, rows_of_location, columns_of_location, patch_frames, patch_rows, patch_columns,
    grid_rows, grid_columns, adaptive, weighted_kl, unreduced, beta, advantage_clip, kl_coef,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_C: tl.constexpr,
):  # fmt: skip
    positions, channels = positions // UNIT_P * UNIT_P, channels // UNIT_C * UNIT_C
    cells = positions // (patch_frames * patch_rows * patch_columns)
    o_b = (tl.program_id(0) // tiles).to(tl.int64)
    p_v += o_b * stride_v_b
    p_old += o_b * stride_old_b
    p_target += o_b * stride_target_b
    if p_ref is not None:
        p_ref += o_b * stride_ref_b
    b_count = tl.zeros([BLOCK_P], dtype=tl.float32)
    b_kl = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    b_positive, b_negative, b_positive_absolute, b_negative_absolute, b_deviation = b_kl, b_kl, b_kl, b_kl, b_kl
    for first in range(tl.program_id(0) % tiles * BLOCK_P, positions, tiles * BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        m_p = load_mask(p_mask, o_b, o_p, positions)
        o_cell = grid_cells(
            o_p, rows_of_location, columns_of_location, patch_frames, patch_rows, patch_columns, grid_rows, grid_columns
        )
        b_weight = load_weights(p_weights, o_b, o_cell, cells, o_p < positions)
        b_kl_weight = tl.where(weighted_kl != 0, b_weight, 1.0)
        b_count += tl.where(m_p, 1.0, 0.0)
        for c0 in range(0, channels, BLOCK_C):
            o_c = c0 + tl.arange(0, BLOCK_C)
            m_tile = (o_p < positions)[:, None] & (o_c < channels)[None, :]
            b_v = load_tile(p_v, stride_v_c, stride_v_p, o_p, o_c, m_tile)
            b_old = load_tile(p_old, stride_old_c, stride_old_p, o_p, o_c, m_tile)
            b_error = b_old - load_tile(p_target, stride_target_c, stride_target_p, o_p, o_c, m_tile)
            b_change = b_v - b_old
            b_for, b_against = b_error + beta * b_change, b_error - beta * b_change
            b_positive += tl.where(m_p[:, None], b_weight[:, None] * (b_for * b_for), 0.0)
            b_negative += tl.where(m_p[:, None], b_weight[:, None] * (b_against * b_against), 0.0)
            b_positive_absolute += tl.where(m_p[:, None], tl.abs(b_for), 0.0)
            b_negative_absolute += tl.where(m_p[:, None], tl.abs(b_against), 0.0)
            b_deviation += tl.where(m_p[:, None], b_change * b_change, 0.0)
            if p_ref is not None:
                b_difference = b_v - load_tile(p_ref, stride_ref_c, stride_ref_p, o_p, o_c, m_tile)
                b_kl += tl.where(m_p[:, None], b_kl_weight[:, None] * (b_difference * b_difference), 0.0)
    if p_mask is not None:
        store_sum(p_partial, COUNT, b_count)
    if p_ref is not None:
        store_sum(p_partial, KL, b_kl)
    store_sum(p_partial, POSITIVE, b_positive)
    store_sum(p_partial, NEGATIVE, b_negative)
    store_sum(p_partial, POSITIVE_ABSOLUTE, b_positive_absolute)
    store_sum(p_partial, NEGATIVE_ABSOLUTE, b_negative_absolute)
    store_sum(p_partial, DEVIATION, b_deviation)
    if last_to_arrive(p_counter):
        _finish(
            p_partial, p_advantages, p_sigma, p_mask, p_step_weights, p_ref, p_loss, p_metrics, p_saved,
            batch, channels, positions, tiles, adaptive, unreduced, beta, advantage_clip, kl_coef,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=NUMBERS)
def nft_backward_kernel(
    p_v, p_old, p_target, p_ref, p_grad, p_weights, p_mask, p_grad_loss, p_saved,
    stride_v_b, stride_v_c, stride_v_p, stride_old_b, stride_old_c, stride_old_p, stride_target_b, stride_target_c,
    stride_target_p, stride_ref_b, stride_ref_c, stride_ref_p, stride_grad_b, stride_grad_c, stride_grad_p,
    batch, channels, positions, tiles, rows_of_location, columns_of_location, patch_frames, patch_rows, patch_columns,
    grid_rows, grid_columns, weighted_kl, unreduced, inverse_channels, kl_share,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNIT_P: tl.constexpr, UNIT_C: tl.constexpr,
):  # fmt: skip
    positions, channels = positions // UNIT_P * UNIT_P, channels // UNIT_C * UNIT_C
    cells = positions // (patch_frames * patch_rows * patch_columns)
    o_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = load_mask(p_mask, o_b, o_p, positions)
    p_v += o_b * stride_v_b
    p_old += o_b * stride_old_b
    p_target += o_b * stride_target_b
    if p_ref is not None:
        p_ref += o_b * stride_ref_b
    p_grad += o_b * stride_grad_b
    o_cell = grid_cells(
        o_p, rows_of_location, columns_of_location, patch_frames, patch_rows, patch_columns, grid_rows, grid_columns
    )
    b_weight = load_weights(p_weights, o_b, o_cell, cells, o_p < positions)
    upstream = tl.load(p_grad_loss + tl.where(unreduced != 0, o_b, 0))
    p_saved += o_b
    b_of_error = b_weight * (upstream * tl.load(p_saved))
    b_of_change = b_weight * (upstream * tl.load(p_saved + batch))
    kl = upstream * tl.load(p_saved + 2 * batch) * inverse_channels * kl_share * 2.0
    b_kl = tl.where(weighted_kl != 0, b_weight, 1.0) * kl
    for c0 in range(0, channels, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_tile = (o_p < positions)[:, None] & (o_c < channels)[None, :]
        b_v = load_tile(p_v, stride_v_c, stride_v_p, o_p, o_c, m_tile)
        b_old = load_tile(p_old, stride_old_c, stride_old_p, o_p, o_c, m_tile)
        b_error = b_old - load_tile(p_target, stride_target_c, stride_target_p, o_p, o_c, m_tile)
        b_grad = b_of_error[:, None] * b_error + b_of_change[:, None] * (b_v - b_old)
        if p_ref is not None:
            b_grad += b_kl[:, None] * (b_v - load_tile(p_ref, stride_ref_c, stride_ref_p, o_p, o_c, m_tile))
        store_tile(tl.where(m_p[:, None], b_grad, 0.0), p_grad, stride_grad_c, stride_grad_p, o_p, o_c, m_tile)


def nft_forward(arguments: NftArguments, results: Forward) -> None:
    """Writes loss, metrics and the numbers saved for the backward pass."""
    a = arguments
    shape = geometry(a.model_output, a.channel_dim)
    tiles = shape.tiles_to_add
    programs = shape.batch * tiles
    device = a.model_output.device
    with torch.cuda.device_of(a.model_output):
        nft_forward_kernel[(programs,)](
            **_kernel_arguments(a, shape),
            p_advantages=a.advantages,
            p_sigma=a.sigma,
            p_step_weights=a.step_weights,
            p_partial=torch.empty(ROWS, programs, dtype=torch.float64, device=device),
            p_counter=zero_counters(device),
            p_loss=results.loss,
            p_metrics=results.metrics,
            p_saved=results.saved,
            tiles=tiles,
            adaptive=int(a.adaptive),
            beta=float(a.beta),
            advantage_clip=float(a.advantage_clip),
            kl_coef=float(a.kl_coef),
            **LAUNCH,
        )


def nft_backward(arguments: NftArguments, results: Backward) -> None:
    """Writes the gradient with respect to model_output."""
    a = arguments
    shape = geometry(a.model_output, a.channel_dim)
    with torch.cuda.device_of(a.model_output):
        nft_backward_kernel[(shape.batch * shape.tiles,)](
            **_kernel_arguments(a, shape),
            **latent_arguments(a.channel_dim, grad=results.gradient),
            p_grad_loss=results.grad_loss,
            p_saved=results.saved,
            tiles=shape.tiles,
            inverse_channels=1.0 / shape.channels,
            kl_share=a.kl_coef if a.unreduced else a.kl_coef / shape.batch,
            **LAUNCH,
        )


def _kernel_arguments(a: NftArguments, shape: Geometry) -> dict[str, Any]:
    """The arguments, by name, that both kernels share."""
    grid = None if a.weights is None else tuple(a.weights.shape[1:])
    return {
        **latent_arguments(
            a.channel_dim, v=a.model_output, old=a.old_model_output, target=a.target, ref=a.ref_model_output
        ),
        "p_weights": a.weights,
        "p_mask": a.mask,
        "batch": shape.batch,
        "channels": shape.channels,
        "positions": shape.positions,
        **patch_arguments(a.model_output, a.channel_dim, grid),
        "weighted_kl": int(a.weighted_kl),
        "unreduced": int(a.unreduced),
        **shape.constants,
    }
