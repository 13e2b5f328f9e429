"""Reference implementations of the policy losses and of the sampling step, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.policy.arguments import NftArguments, PolicyArguments, SampleArguments

METRICS = ("ratio_mean", "ratio_max", "clip_fraction", "approx_kl", "kl_new_old_mean", "policy_loss", "kl_loss")
NFT_METRICS = ("positive_loss", "negative_loss", "deviation", "policy_loss", "kl_loss")
LEAST_ERROR = 1e-5  # lower bound of the mean absolute error that DiffusionNFT divides by


def sample_transition(arguments: SampleArguments) -> tuple[Tensor, Tensor]:
    """``prev = mean + std noise``, in the sample's dtype, and the log-probability of that stored value."""
    model_output, sample, noise, coefficients, channel_dim = arguments
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


def weighted_policy_loss(arguments: PolicyArguments) -> tuple[Tensor, Tensor]:
    """The loss, ``[]`` or ``[B]``, and the metrics, a tensor [7] in the order of METRICS.

    In the shapes below N is the number of phrases, and 1 for advantages ``[B]`` and ``[B, *locations]``.
    """
    a = arguments
    mask = None if a.mask is None else a.mask.unsqueeze(1)
    model_output = _keep(a.model_output, a)
    own = _log_ratios(a, model_output).unsqueeze(1)  # [B, 1, *locations]
    weights = _phrase_weights(a, own)  # [B, N, *locations]
    if a.per_location:
        log_ratio = acting = _normalised(own, a)
    else:
        log_ratio = location_mean(weights * own, mask, leading=2)  # [B, N]
        if a.old_log_prob.ndim == 1:
            log_ratio = log_ratio - a.old_log_prob.unsqueeze(1)
        log_ratio = acting = _normalised(log_ratio, a)
        if a.dense:  # GSPO-token: the value of a location's ratio is the sample's, its gradient the location's own
            own = _normalised(own, a)
            acting = log_ratio.detach().reshape(-1, *[1] * (own.ndim - 1)) + (own - own.detach())
    counts = torch.ones_like(own, dtype=torch.bool) if mask is None else mask  # what enters the sums

    divergence = None if not a.kl_mask_threshold else _divergence(a, model_output).unsqueeze(1)  # as log_ratio
    if divergence is not None and not a.per_location:
        divergence = location_mean(divergence, mask, leading=2)  # [B, 1]
    advantages = _clamped_advantages(a, acting)
    if divergence is None:
        surrogate = _surrogate(acting, advantages, weights if acting.ndim > 2 else None, a)
    else:
        diverged = divergence >= a.kl_mask_threshold
        acting_diverged = diverged.reshape(*diverged.shape, *[1] * (acting.ndim - diverged.ndim))
        surrogate = _masked_surrogate(acting, advantages, weights if acting.ndim > 2 else None, acting_diverged)
    if acting.ndim > 2:  # of locations
        surrogate = (weights * surrogate).sum(dim=1, keepdim=True)
    policy_loss = _counted_mean(surrogate, counts).sum(dim=1)  # [B]
    if a.step_weights is not None:
        policy_loss = policy_loss * a.step_weights
    kl_loss = torch.zeros_like(policy_loss)
    if a.ref_model_output is not None:
        b, kl_scale = (_columns(a.coefficients, a.model_output)[i] for i in (1, 5))
        difference = _wide(model_output) - _wide(_keep(a.ref_model_output, a))
        squared = (kl_scale * b.square() * difference.square()).mean(dim=a.channel_dim)
        kl_loss = location_mean(_weigh(squared, a.weights if a.weighted_kl else None), a.mask)
    ratio = torch.exp(log_ratio)
    outside = (ratio < a.clip_low) | (ratio > a.clip_high)
    if divergence is not None:
        outside = diverged.expand_as(ratio)
    else:
        divergence = torch.zeros_like(ratio)
    metrics = (
        _counted_mean(ratio, counts).mean(),
        ratio.masked_fill(~_counted(ratio, counts), 0.0).max(),
        _counted_mean(outside.to(ratio.dtype), counts).mean(),
        0.5 * _counted_mean(log_ratio.square(), counts).mean(),
        _counted_mean(divergence, counts).mean(),
    )
    return _reduced(policy_loss, kl_loss, a.kl_coef, a.unreduced, metrics)


def weighted_nft_loss(arguments: NftArguments) -> tuple[Tensor, Tensor]:
    """The loss, ``[]`` or ``[B]``, and the metrics, a tensor [5] in the order of NFT_METRICS."""
    a = arguments
    v, old, target = (_wide(_keep(t, a)) for t in (a.model_output, a.old_model_output, a.target))
    likely = ((a.advantages / a.advantage_clip).clamp(-1, 1) + 1) / 2  # [B]: how likely this sample is a good one
    losses = []
    for direction in (a.beta, -a.beta):
        error = old + direction * (v - old) - target
        squared = location_mean(_weigh(error.square().mean(dim=a.channel_dim), a.weights), a.mask)  # [B]
        if a.adaptive:  # the error of the image is sigma times that of the velocity
            absolute = location_mean(error.detach().abs().mean(dim=a.channel_dim), a.mask)
            squared = a.sigma.square() * squared / (a.sigma * absolute).clamp(min=LEAST_ERROR)
        losses.append(squared)
    positive, negative = losses
    policy_loss = (likely * positive + (1 - likely) * negative) * (a.advantage_clip / a.beta)
    if a.step_weights is not None:
        policy_loss = policy_loss * a.step_weights
    kl_loss = torch.zeros_like(policy_loss)
    if a.ref_model_output is not None:
        difference = v - _wide(_keep(a.ref_model_output, a))
        squared = difference.square().mean(dim=a.channel_dim)
        kl_loss = location_mean(_weigh(squared, a.weights if a.weighted_kl else None), a.mask)
    deviation = location_mean((v - old).square().mean(dim=a.channel_dim), a.mask)
    metrics = (positive.mean(), negative.mean(), deviation.mean())
    return _reduced(policy_loss, kl_loss, a.kl_coef, a.unreduced, metrics)


def location_mean(values: Tensor, mask: Tensor | None, leading: int = 1) -> Tensor:
    """The mean over the locations that a mask keeps, 0 if it keeps none; ``leading`` dimensions come before them."""
    if mask is None:
        return values.flatten(leading).mean(dim=leading)
    kept = mask.flatten(leading).sum(dim=leading).clamp(min=1)
    return values.masked_fill(~mask, 0.0).flatten(leading).sum(dim=leading) / kept


def upsample(weights: Tensor, shape: torch.Size, leading: int = 1) -> Tensor:
    """Weights of a patch grid for every location of the latent (nearest neighbour)."""
    for axis in range(leading, weights.ndim):
        weights = weights.repeat_interleave(shape[axis] // weights.shape[axis], dim=axis)
    return weights


def _log_ratios(a: PolicyArguments, model_output: Tensor) -> Tensor:
    """The log-ratio of each location, [B, *locations], less what old log-probabilities [B] would subtract."""
    sample, prev_sample = _keep(a.sample, a), _keep(a.prev_sample, a)
    log_ratio = log_prob(model_output, sample, prev_sample, a.coefficients, a.channel_dim)
    if a.old_log_prob.ndim > 1:
        log_ratio = log_ratio - (a.old_log_prob if a.mask is None else a.old_log_prob.masked_fill(~a.mask, 0.0))
    if a.guarded:  # GRPO-Guard: takes out the mean of the log-ratio
        scale = _columns(a.coefficients, log_ratio)[3]
        log_ratio = log_ratio + scale * _squared_change(a, model_output)
    return log_ratio


def _squared_change(a: PolicyArguments, model_output: Tensor) -> Tensor:
    """``(mean - mean_old)^2``, averaged over channels: [B, *locations]."""
    assert a.old_model_output is not None
    change = _wide(model_output) - _wide(_keep(a.old_model_output, a))
    squared = change.square().mean(dim=a.channel_dim)
    return _columns(a.coefficients, squared)[1].square() * squared


def _divergence(a: PolicyArguments, model_output: Tensor) -> Tensor:
    """The Kullback-Leibler divergence from the old policy, averaged over channels: [B, *locations], no gradient."""
    squared = _squared_change(a, model_output.detach())
    return squared / (2 * _columns(a.coefficients, squared)[2].square())


def _normalised(log_ratio: Tensor, a: PolicyArguments) -> Tensor:
    """GRPO-Guard: takes out the dependence of the log-ratio on the noise scale."""
    if not a.guarded:
        return log_ratio
    std, scale = _columns(a.coefficients, log_ratio)[2:4]
    return log_ratio / (2 * scale * std)


def _phrase_weights(a: PolicyArguments, like: Tensor) -> Tensor:
    if a.weights is None:
        return torch.ones_like(like)
    return upsample(a.weights if a.has_phrases else a.weights.unsqueeze(1), like.shape, leading=2)


def _clamped_advantages(a: PolicyArguments, like: Tensor) -> Tensor:
    """[B, N], [B, N, 1...] or [B, 1, *locations], to broadcast with log-ratios."""
    advantages = a.advantages.clamp(-a.advantage_clip, a.advantage_clip)
    if not a.has_phrases:
        advantages = advantages.unsqueeze(1)
    return advantages.reshape(*advantages.shape, *[1] * (like.ndim - advantages.ndim))


def _surrogate(log_ratio: Tensor, advantage: Tensor, weights: Tensor | None, a: PolicyArguments) -> Tensor:
    """max(-A rho, -A clip(rho)), to be multiplied by the weights.

    A ratio that overflows has no gradient, rather than 0 * inf, if it is clipped, or if advantage or weight are zero.
    """
    ratio = torch.exp(log_ratio)
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(a.clip_low, a.clip_high)
    outside = (ratio < a.clip_low) | (ratio > a.clip_high)
    idle = (advantage if weights is None else advantage * weights) == 0
    bounds = outside & ((bounded > free) | idle)
    return torch.where(bounds, bounded.detach(), -advantage * torch.exp(log_ratio.masked_fill(bounds, 0.0)))


def _masked_surrogate(log_ratio: Tensor, advantage: Tensor, weights: Tensor | None, diverged: Tensor) -> Tensor:
    """-A rho, and 0 where the policy has diverged and the gradient leads further away (Flow-DPPO).

    A ratio that overflows has no gradient, rather than 0 * inf, there, or if advantage or weight are zero.
    """
    ratio = torch.exp(log_ratio)
    further = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
    idle = (advantage if weights is None else advantage * weights) == 0
    dropped = (diverged & further) | (idle & (ratio == torch.inf))
    return (-advantage * torch.exp(log_ratio.masked_fill(dropped, 0.0))).masked_fill(dropped, 0.0)


def _counted(values: Tensor, counts: Tensor) -> Tensor:
    """Which of the values of locations [B, N, *locations], or of samples [B, N], enter the sums."""
    return counts if values.ndim > 2 else counts.flatten(2).any(dim=2)


def _counted_mean(values: Tensor, counts: Tensor) -> Tensor:
    """The mean over the locations that count, [B, N]; values of samples [B, N] without such a location become 0."""
    if values.ndim == 2:
        return values.masked_fill(~_counted(values, counts), 0.0)
    return location_mean(values, counts, leading=2)


def _reduced(
    policy_loss: Tensor, kl_loss: Tensor, kl_coef: float, unreduced: bool, metrics: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    loss = policy_loss + kl_coef * kl_loss
    summary = torch.stack([*metrics, policy_loss.mean(), kl_loss.mean()]).detach()
    return loss if unreduced else loss.mean(), summary


def _weigh(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else upsample(weights, values.shape) * values


def _keep(latent: Tensor, a: PolicyArguments | NftArguments) -> Tensor:
    """The latent with zeros where the mask drops a location: values there reach neither the loss nor the gradient."""
    return latent if a.mask is None else latent.masked_fill(~a.mask.unsqueeze(a.channel_dim), 0.0)


def _columns(coefficients: Tensor, like: Tensor) -> list[Tensor]:
    """Each row of the table, shaped to broadcast over ``like``."""
    table = coefficients.to(torch.float64) if like.dtype == torch.float64 else coefficients
    return [row.reshape(-1, *[1] * (like.ndim - 1)) for row in table]


def _wide(tensor: Tensor) -> Tensor:
    """The dtype of the arithmetic: float32, or float64 as given."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
