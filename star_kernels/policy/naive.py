"""The definitions of the policy losses and of the sampling step, in plain differentiable PyTorch.

Arguments are those of ``star_kernels.policy`` after validation; ``channel_dim`` counts from the front.
"""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("ratio_mean", "ratio_max", "clip_fraction", "approx_kl", "policy_loss", "kl_loss")
NFT_METRICS = ("positive_loss", "negative_loss", "deviation", "policy_loss", "kl_loss")
LEAST_ERROR = 1e-5  # of the mean absolute error that DiffusionNFT divides by


def sample_transition(
    model_output: Tensor, sample: Tensor, noise: Tensor, coefficients: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor]:
    """``prev = mean + std noise``, in the sample's dtype, and the log-probability of that stored value."""
    a, b, std, *_ = _columns(coefficients, model_output)
    prev_sample = (a * _wide(sample) + b * _wide(model_output) + std * _wide(noise)).to(sample.dtype)
    return prev_sample, log_prob(model_output, sample, prev_sample, coefficients, channel_dim)


def log_prob(
    model_output: Tensor, sample: Tensor, prev_sample: Tensor, coefficients: Tensor, channel_dim: int
) -> Tensor:
    """``offset - scale (prev - mean)^2``, averaged over channels: [B, *locations]."""
    a, b, _, scale, offset, _ = _columns(coefficients, model_output)
    residual = _wide(prev_sample) - (a * _wide(sample) + b * _wide(model_output))
    return (offset - scale * residual.square()).mean(dim=channel_dim)


def weighted_policy_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,  # [B, *locations], or [B]: the mean over locations
    advantages: Tensor,  # [B]
    coefficients: Tensor,  # [6, B] or [6, 1]
    weights: Tensor | None,  # [B, *grid]
    mask: Tensor | None,  # bool [B, *locations]
    step_weights: Tensor | None,  # [B]
    old_model_output: Tensor | None,
    ref_model_output: Tensor | None,
    channel_dim: int,
    per_location: bool,
    weighted_kl: bool,
    per_sample: bool,
    clip_low: float,
    clip_high: float,
    advantage_clip: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor]:
    """The loss, ``[]`` or ``[B]``, and the metrics, a tensor [6] in the order of METRICS."""
    model_output, sample, prev_sample = (_keep(t, mask, channel_dim) for t in (model_output, sample, prev_sample))
    log_ratio = log_prob(model_output, sample, prev_sample, coefficients, channel_dim)  # [B, *locations]
    weight = torch.ones_like(log_ratio) if weights is None else upsample(weights, log_ratio.shape)
    if old_log_prob.ndim > 1:
        log_ratio = log_ratio - (old_log_prob if mask is None else old_log_prob.masked_fill(~mask, 0.0))
    if old_model_output is not None:  # GRPO-Guard: takes out the mean of the log-ratio
        b, scale = (_columns(coefficients, log_ratio)[i] for i in (1, 3))
        shift = _wide(model_output) - _wide(_keep(old_model_output, mask, channel_dim))
        log_ratio = log_ratio + scale * b.square() * shift.square().mean(dim=channel_dim)
    if not per_location:
        log_ratio = location_mean(weight * log_ratio, mask)  # [B]
        if old_log_prob.ndim == 1:
            log_ratio = log_ratio - old_log_prob
        weight = torch.ones_like(log_ratio)
    if old_model_output is not None:  # and its dependence on the noise scale
        std, scale = _columns(coefficients, log_ratio)[2:4]
        log_ratio = log_ratio / (2 * scale * std)
    ratio = torch.exp(log_ratio)
    advantage = advantages.clamp(-advantage_clip, advantage_clip)
    advantage = advantage.reshape(-1, *[1] * (ratio.ndim - 1))
    # max(-A rho, -A clip(rho)), written so that a ratio that overflows and is clipped has no gradient, not 0 * inf.
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(clip_low, clip_high)
    outside = (ratio < clip_low) | (ratio > clip_high)
    bounds = outside & (bounded > free)
    surrogate = torch.where(bounds, bounded.detach(), -advantage * torch.exp(log_ratio.masked_fill(bounds, 0.0)))

    counts = torch.ones_like(log_ratio, dtype=torch.bool)  # what enters the sums
    if mask is not None:
        counts = mask if per_location else mask.flatten(1).any(dim=1)
    policy_loss = location_mean(weight * surrogate, counts)  # [B]
    if step_weights is not None:
        policy_loss = policy_loss * step_weights
    kl_loss = torch.zeros_like(policy_loss)
    if ref_model_output is not None:
        b, kl_scale = (_columns(coefficients, model_output)[i] for i in (1, 5))
        difference = _wide(model_output) - _wide(_keep(ref_model_output, mask, channel_dim))
        squared = (kl_scale * b.square() * difference.square()).mean(dim=channel_dim)
        kl_loss = location_mean(_weigh(squared, weights if weighted_kl else None), mask)
    metrics = (
        location_mean(ratio, counts).mean(),
        ratio.masked_fill(~counts, 0.0).max(),
        location_mean(outside.to(ratio.dtype), counts).mean(),
        0.5 * location_mean(log_ratio.square(), counts).mean(),
    )
    return _reduced(policy_loss, kl_loss, kl_coef, per_sample, metrics)


def weighted_nft_loss(
    model_output: Tensor,
    old_model_output: Tensor,
    target: Tensor,
    advantages: Tensor,  # [B]
    sigma: Tensor,  # [B]
    weights: Tensor | None,  # [B, *grid]
    mask: Tensor | None,  # bool [B, *locations]
    step_weights: Tensor | None,  # [B]
    ref_model_output: Tensor | None,
    channel_dim: int,
    adaptive: bool,
    weighted_kl: bool,
    per_sample: bool,
    beta: float,
    advantage_clip: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor]:
    """The loss, ``[]`` or ``[B]``, and the metrics, a tensor [5] in the order of NFT_METRICS."""
    v, old, target = (_wide(_keep(t, mask, channel_dim)) for t in (model_output, old_model_output, target))
    likely = ((advantages / advantage_clip).clamp(-1, 1) + 1) / 2  # [B]: how likely this sample is a good one
    losses = []
    for direction in (beta, -beta):
        error = old + direction * (v - old) - target
        squared = location_mean(_weigh(error.square().mean(dim=channel_dim), weights), mask)  # [B]
        if adaptive:  # the error of the image is sigma times that of the velocity
            absolute = location_mean(error.detach().abs().mean(dim=channel_dim), mask)
            squared = sigma.square() * squared / (sigma * absolute).clamp(min=LEAST_ERROR)
        losses.append(squared)
    positive, negative = losses
    policy_loss = (likely * positive + (1 - likely) * negative) * (advantage_clip / beta)
    if step_weights is not None:
        policy_loss = policy_loss * step_weights
    kl_loss = torch.zeros_like(policy_loss)
    if ref_model_output is not None:
        difference = v - _wide(_keep(ref_model_output, mask, channel_dim))
        squared = difference.square().mean(dim=channel_dim)
        kl_loss = location_mean(_weigh(squared, weights if weighted_kl else None), mask)
    deviation = location_mean((v - old).square().mean(dim=channel_dim), mask)
    metrics = (positive.mean(), negative.mean(), deviation.mean())
    return _reduced(policy_loss, kl_loss, kl_coef, per_sample, metrics)


def location_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the locations that a mask keeps, [B]; 0 where it keeps none."""
    if values.ndim == 1:
        return values if mask is None else values.masked_fill(~mask, 0.0)
    if mask is None:
        return values.flatten(1).mean(dim=1)
    kept = mask.flatten(1).sum(dim=1).clamp(min=1)
    return values.masked_fill(~mask, 0.0).flatten(1).sum(dim=1) / kept


def upsample(weights: Tensor, shape: torch.Size) -> Tensor:
    """Weights of a patch grid for every location of the latent (nearest neighbour)."""
    for axis in range(1, weights.ndim):
        weights = weights.repeat_interleave(shape[axis] // weights.shape[axis], dim=axis)
    return weights


def _reduced(
    policy_loss: Tensor, kl_loss: Tensor, kl_coef: float, per_sample: bool, metrics: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    loss = policy_loss + kl_coef * kl_loss
    summary = torch.stack([*metrics, policy_loss.mean(), kl_loss.mean()]).detach()
    return loss if per_sample else loss.mean(), summary


def _weigh(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else upsample(weights, values.shape) * values


def _keep(latent: Tensor, mask: Tensor | None, channel_dim: int) -> Tensor:
    """The latent with zeros where the mask drops a location: whatever lies there reaches neither loss nor gradient."""
    return latent if mask is None else latent.masked_fill(~mask.unsqueeze(channel_dim), 0.0)


def _columns(coefficients: Tensor, like: Tensor) -> list[Tensor]:
    """Each row of the table, shaped to broadcast over ``like``."""
    table = coefficients.to(torch.float64) if like.dtype == torch.float64 else coefficients
    return [row.reshape(-1, *[1] * (like.ndim - 1)) for row in table]


def _wide(tensor: Tensor) -> Tensor:
    """The dtype of the arithmetic: float32, or float64 as given."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
