"""The objectives beside Flow-GRPO's loss, each as ours and as trainers write it in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.variants.policy import ADVANTAGE_CLIP, CLIP_RANGE, Inputs, flow_grpo_step
from star_kernels import flow_matching, sample_transition, weighted_nft_loss, weighted_policy_loss

Gradient = tuple[Tensor, Tensor]  # loss and gradient


def pairs(x: Inputs) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Name -> (ours, eager); what both return agrees."""
    old, noise, reference = (torch.randn_like(x.sample) for _ in range(3))
    old = x.model_output.detach().float() + 1e-3 * old
    target = noise - x.sample
    return {
        "sampling": (lambda: ours_sampling(x, noise), lambda: eager_sampling(x, noise)),
        "location": (lambda: ours_location(x), lambda: eager_location(x)),
        "kl": (lambda: ours_kl(x, reference), lambda: eager_kl(x, reference)),
        "guard": (lambda: ours_guard(x, old), lambda: eager_guard(x, old)),
        "nft": (lambda: ours_nft(x, old, target), lambda: eager_nft(x, old, target, noise)),
        "matching": (lambda: ours_matching(x, target), lambda: eager_matching(x, target)),
    }


def gradient(x: Inputs, loss: Tensor) -> Gradient:
    return loss.detach(), torch.autograd.grad(loss, x.model_output)[0]


def ours_policy(x: Inputs, **options: Any) -> Gradient:
    loss, _ = weighted_policy_loss(
        x.model_output, x.sample, x.prev_sample, x.old_log_prob, x.advantages, x.transition,
        **{"clip_range": CLIP_RANGE, "advantage_clip": ADVANTAGE_CLIP, **options},
    )  # fmt: skip
    return gradient(x, loss)


def clipped(log_ratio: Tensor, advantages: Tensor, clip_range: float = CLIP_RANGE) -> Tensor:
    advantages = torch.clamp(advantages, -ADVANTAGE_CLIP, ADVANTAGE_CLIP)
    ratio = torch.exp(log_ratio)
    return torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range))


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def ours_sampling(x: Inputs, noise: Tensor) -> tuple[Tensor, Tensor]:
    prev, log_prob = sample_transition(x.model_output, x.sample, x.transition, noise=noise)
    return prev, log_prob.flatten(1).mean(dim=1)


@torch.no_grad()
def eager_sampling(x: Inputs, noise: Tensor) -> tuple[Tensor, Tensor]:
    return flow_grpo_step(x.model_output, x.sample, x.sigma, x.sigma_next, x.sigma_max, noise=noise)


def dense_log_prob(x: Inputs) -> tuple[Tensor, Tensor]:
    """The log-probability of each location, and the mean of the transition."""
    c = x.transition
    a, b, scale, offset = (column(t, x.sample) for t in (c.mean_sample, c.mean_output, c.scale, c.offset))
    mean = a * x.sample + b * x.model_output.float()
    return (offset - scale * (x.prev_sample - mean) ** 2).mean(dim=1), mean


def ours_location(x: Inputs) -> Gradient:
    return ours_policy(x, ratio="location", clip_range=0.1, weights=x.weights)


def eager_location(x: Inputs) -> Gradient:
    log_prob, _ = dense_log_prob(x)
    weights = x.weights.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    losses = clipped(log_prob - x.old_log_prob, column(x.advantages, log_prob), 0.1)
    return gradient(x, (weights * losses).mean())


def ours_kl(x: Inputs, reference: Tensor) -> Gradient:
    return ours_policy(x, ref_model_output=reference, kl_coef=0.04)


def eager_kl(x: Inputs, reference: Tensor) -> Gradient:
    log_prob, mean = dense_log_prob(x)
    loss = clipped(log_prob.flatten(1).mean(dim=1) - x.old_log_prob_mean, x.advantages).mean()
    c = x.transition
    reference_mean = column(c.mean_sample, mean) * x.sample + column(c.mean_output, mean) * reference
    kl = column(c.kl_scale, mean) * (mean - reference_mean) ** 2
    return gradient(x, loss + 0.04 * kl.mean())


def ours_guard(x: Inputs, old: Tensor) -> Gradient:
    return ours_policy(x, old_model_output=old, step_weights=1 / (x.sigma - x.sigma_next), clip_range=0.1)


def eager_guard(x: Inputs, old: Tensor) -> Gradient:
    log_prob, mean = dense_log_prob(x)
    c = x.transition
    old_mean = column(c.mean_sample, mean) * x.sample + column(c.mean_output, mean) * old
    bias = (mean - old_mean).pow(2).flatten(1).mean(dim=1) / (2 * c.std**2)
    log_ratio = (log_prob.flatten(1).mean(dim=1) - x.old_log_prob_mean + bias) * c.std
    return gradient(x, (clipped(log_ratio, x.advantages, 0.1) / (x.sigma - x.sigma_next)).mean())


def ours_nft(x: Inputs, old: Tensor, target: Tensor) -> Gradient:
    return gradient(x, weighted_nft_loss(x.model_output, old, target, x.advantages, x.sigma, beta=0.5).loss)


def eager_nft(x: Inputs, old: Tensor, target: Tensor, noise: Tensor) -> Gradient:
    v, t, image = x.model_output.float(), column(x.sigma, x.sample), x.sample
    noised = (1 - t) * image + t * noise
    share = torch.clamp(x.advantages / ADVANTAGE_CLIP / 2 + 0.5, 0, 1)
    losses = []
    for prediction in (0.5 * v + 0.5 * old, 1.5 * old - 0.5 * v):
        error = noised - t * prediction - image
        divisor = error.detach().abs().mean(dim=(1, 2, 3), keepdim=True).clip(min=1e-5)
        losses.append((error**2 / divisor).mean(dim=(1, 2, 3)))
    loss = (share * losses[0] / 0.5 + (1 - share) * losses[1] / 0.5) * ADVANTAGE_CLIP
    return gradient(x, loss.mean())


def ours_matching(x: Inputs, target: Tensor) -> Gradient:
    loss, _ = weighted_policy_loss(
        x.model_output, x.sample, target, matching_log_prob(x, target).detach(), x.advantages,
        flow_matching(x.sigma), clip_range=CLIP_RANGE,
    )  # fmt: skip
    return gradient(x, loss)


def matching_log_prob(x: Inputs, target: Tensor) -> Tensor:
    return -((x.model_output.float() - target) ** 2).mean(dim=(1, 2, 3))


def eager_matching(x: Inputs, target: Tensor) -> Gradient:
    log_prob = matching_log_prob(x, target)
    return gradient(x, clipped(log_prob - log_prob.detach(), x.advantages).mean())
