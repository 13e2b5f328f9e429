"""The definitions of the policy loss and of the sampling step, in plain differentiable PyTorch.

Arguments are those of ``star_kernels.policy`` after validation; ``channel_dim`` counts from the front.
"""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("ratio_mean", "ratio_max", "clip_fraction", "approx_kl", "policy_loss", "kl_loss")


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
    ref_model_output: Tensor | None,
    channel_dim: int,
    per_location: bool,
    clip_low: float,
    clip_high: float,
    advantage_clip: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor]:
    """The loss and the metrics, a tensor [6] in the order of METRICS."""
    new = log_prob(model_output, sample, prev_sample, coefficients, channel_dim)  # [B, *locations]
    if old_log_prob.ndim == 1:
        log_ratio = new.flatten(1).mean(dim=1) - old_log_prob  # [B]
        weight = torch.ones_like(log_ratio)
    else:
        log_ratio = new - old_log_prob
        weight = torch.ones_like(log_ratio) if weights is None else upsample(weights, log_ratio.shape)
        if not per_location:
            log_ratio = (weight * log_ratio).flatten(1).mean(dim=1)  # [B]
            weight = torch.ones_like(log_ratio)
    ratio = torch.exp(log_ratio)
    advantage = advantages.clamp(-advantage_clip, advantage_clip)
    advantage = advantage.reshape(-1, *[1] * (ratio.ndim - 1))
    # max(-A rho, -A clip(rho)), written so that a ratio that overflows and is clipped has no gradient, not 0 * inf.
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(clip_low, clip_high)
    outside = (ratio < clip_low) | (ratio > clip_high)
    bounds = outside & (bounded > free)
    surrogate = torch.where(bounds, bounded.detach(), -advantage * torch.exp(log_ratio.masked_fill(bounds, 0.0)))
    policy_loss = (weight * surrogate).mean()
    loss, kl_loss = policy_loss, torch.zeros_like(policy_loss)
    if ref_model_output is not None:
        b, kl_scale = (_columns(coefficients, model_output)[i] for i in (1, 5))
        difference = _wide(model_output) - _wide(ref_model_output)
        kl_loss = (kl_scale * b.square() * difference.square()).mean()
        loss = policy_loss + kl_coef * kl_loss
    metrics = (ratio.mean(), ratio.max(), outside.to(ratio.dtype).mean(), 0.5 * log_ratio.square().mean())
    return loss, torch.stack([*metrics, policy_loss, kl_loss]).detach()


def upsample(weights: Tensor, shape: torch.Size) -> Tensor:
    """Weights of a patch grid for every location of the latent (nearest neighbour)."""
    for axis in range(1, weights.ndim):
        weights = weights.repeat_interleave(shape[axis] // weights.shape[axis], dim=axis)
    return weights


def _columns(coefficients: Tensor, like: Tensor) -> list[Tensor]:
    """Each row of the table, shaped to broadcast over ``like``."""
    table = coefficients.to(torch.float64) if like.dtype == torch.float64 else coefficients
    return [row.reshape(-1, *[1] * (like.ndim - 1)) for row in table]


def _wide(tensor: Tensor) -> Tensor:
    """The dtype of the arithmetic: float32, or float64 as given."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
