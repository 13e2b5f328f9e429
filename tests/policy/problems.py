"""Problems for the tests of the policy losses: rollouts in every layout, and the objectives of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from star_kernels import (
    Transition,
    dance_sde,
    flow_cps,
    flow_matching,
    flow_sde,
    sample_transition,
    weighted_policy_loss,
)

BATCH = 4
SIGMA = torch.tensor([1.0, 0.9, 0.6, 0.3])
SIGMA_NEXT = torch.tensor([0.93, 0.8, 0.5, 0.15])
SIGMA_MAX = 0.94
SAMPLERS: dict[str, Callable[[], Transition]] = {
    "flow_sde": lambda: flow_sde(SIGMA, SIGMA_NEXT, noise_level=0.7, sigma_max=SIGMA_MAX),
    "flow_cps": lambda: flow_cps(SIGMA, SIGMA_NEXT, noise_level=0.8),
    "dance_sde": lambda: dance_sde(SIGMA, SIGMA_NEXT, eta=0.3),
    "flow_matching": lambda: flow_matching(SIGMA, weight=1 / SIGMA),
}
# shape, channel dimension
LAYOUTS = {
    "image": ((BATCH, 16, 24, 20), 1),
    "image_odd": ((BATCH, 3, 37, 31), 1),
    "one_channel": ((BATCH, 1, 30, 20), 1),
    "one_position": ((BATCH, 5, 1, 1), 1),
    "many_channels": ((BATCH, 1100, 3, 3), 1),
    "rows": ((BATCH, 4, 65), 1),
    "packed": ((BATCH, 130, 64), -1),
    "packed_wide": ((BATCH, 7, 1100), 2),
    "channels_innermost": ((BATCH, 24, 20, 16), -1),
    "video": ((BATCH, 4, 3, 12, 14), 1),
    "video_frames_first": ((BATCH, 3, 4, 12, 14), 2),
    "channels_between": ((BATCH, 12, 4, 14), 2),
}
RATIOS = ["sample", "location"]


def locations(shape: tuple[int, ...], channel_dim: int) -> list[int]:
    return [n for d, n in enumerate(shape) if d not in (0, channel_dim % len(shape))]


@dataclass
class Problem:
    model_output: Tensor
    sample: Tensor
    prev_sample: Tensor
    old_log_prob: Tensor  # [B, *locations]
    advantages: Tensor
    transition: Transition
    channel_dim: int
    old_model_output: Tensor | None = None

    @property
    def positional(self) -> tuple:
        return (
            self.model_output,
            self.sample,
            self.prev_sample,
            self.old_log_prob,
            self.advantages,
            self.transition,
        )


def make(
    backend: tuple[str, str], layout: str = "image", sampler: str = "flow_sde", drift: float = 0.02, seed: int = 0
) -> Problem:
    """A rollout by one model, and the output of another that has drifted from it."""
    device = backend[1]
    shape, channel_dim = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    old, change, sample, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    transition = SAMPLERS[sampler]().to(device)
    prev_sample, log_prob = sample_transition(
        old, sample, transition, noise=noise, channel_dim=channel_dim, backend="naive"
    )
    advantages = torch.tensor([1.5, -0.7, 9.0, -0.2], device=device)
    return Problem(old + drift * change, sample, prev_sample, log_prob, advantages, transition, channel_dim, old)


def run(
    problem: Problem, backend: tuple[str, str], upstream: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor, dict]:
    """Loss, gradient and metrics."""
    leaf = problem.model_output.detach().requires_grad_()
    problem = replace(problem, model_output=leaf)
    loss, metrics = weighted_policy_loss(
        *problem.positional, channel_dim=problem.channel_dim, backend=backend[0], **options
    )
    assert loss.shape == ()
    (loss * upstream).backward()
    return loss.detach(), leaf.grad, metrics


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.double().to(like.device).view(-1, *[1] * (like.ndim - 1))


def log_density(sampler: str, v: Tensor, x: Tensor, prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of each element, the mean, and s of the KL term, as the papers of the samplers define them."""
    sigma, following = column(SIGMA, x), column(SIGMA_NEXT, x)
    dt = following - sigma
    if sampler == "flow_matching":
        weight = 1 / sigma
        return -weight * (v - prev) ** 2, v, torch.sqrt(1 / (2 * weight))
    if sampler == "flow_cps":
        s = following * math.sin(0.8 * math.pi / 2)
        x0, x1 = x - sigma * v, x + (1 - sigma) * v
        mean = (1 - following) * x0 + torch.sqrt(following**2 - s**2) * x1
        return -((prev - mean) ** 2), mean, s
    if sampler == "dance_sde":
        s = torch.full_like(sigma, 0.3)
        score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
        mean = x + v * dt - 0.5 * s**2 * dt * score
    else:
        s = 0.7 * torch.sqrt(sigma / (1 - torch.where(sigma == 1, SIGMA_MAX, sigma)))
        mean = x * (1 + s**2 * dt / (2 * sigma)) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    std = s * torch.sqrt(-dt)
    return -((prev - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi)), mean, s


def written_loss(
    problem: Problem,
    sampler: str,
    *,
    weights: Tensor | None = None,
    ratio: str = "sample",
    clip_range: float = 1e-4,
    reference: Tensor | None = None,
    kl_coef: float = 0.0,
    upstream: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Flow-GRPO's loss and gradient in float64; with weights, the spatially resolved objective."""
    v = problem.model_output.detach().double().requires_grad_()
    x, prev = problem.sample.double(), problem.prev_sample.double()
    log_prob, mean, s = log_density(sampler, v, x, prev)
    rest = tuple(range(1, v.ndim))
    advantages = problem.advantages.double().clamp(-5, 5)
    if weights is None and ratio == "sample":  # Flow-GRPO as it stands
        rho = torch.exp(log_prob.mean(dim=rest) - problem.old_log_prob.double().flatten(1).mean(dim=1))
        unclipped = -advantages * rho
        clipped = -advantages * torch.clamp(rho, 1.0 - clip_range, 1.0 + clip_range)
        loss = torch.mean(torch.maximum(unclipped, clipped))
    else:
        delta = log_prob.mean(dim=problem.channel_dim) - problem.old_log_prob.double()
        w = torch.ones_like(delta) if weights is None else weights.double()
        if ratio == "sample":
            rho, w = torch.exp((w * delta).flatten(1).mean(dim=1)), torch.ones(BATCH, dtype=torch.float64)
        else:
            rho = torch.exp(delta)
            advantages = column(advantages, rho)
        unclipped = -advantages * rho
        clipped = -advantages * torch.clamp(rho, 1.0 - clip_range, 1.0 + clip_range)
        loss = torch.mean(w.to(rho.device) * torch.maximum(unclipped, clipped))
    if reference is not None:
        _, reference_mean, _ = log_density(sampler, reference.double(), x, prev)
        kl = ((mean - reference_mean) ** 2).mean(dim=rest, keepdim=True) / (2 * s**2)
        loss = loss + kl_coef * torch.mean(kl)
    (loss * upstream).backward()
    return loss.detach(), v.grad


def close(got: Tensor, exact: Tensor, tolerance: float) -> None:
    """Relative to the size of the exact tensor."""
    assert bool(got.isfinite().all())
    error = float((got.double() - exact).norm() / exact.norm())
    assert error <= tolerance, f"relative error {error:.3g}"


def patch_weights(problem: Problem, grid: list[int]) -> Tensor:
    weights = torch.rand(BATCH, *grid, generator=torch.Generator().manual_seed(7))
    weights = weights * (weights > 0.2)
    weights.flatten(1)[:, 0] = 1.0  # not all of them zero
    return (weights / weights.mean(dim=tuple(range(1, weights.ndim)), keepdim=True)).to(problem.model_output.device)


def upsampled(weights: Tensor, size: list[int]) -> Tensor:
    for d, n in enumerate(size, start=1):
        weights = weights.repeat_interleave(n // weights.shape[d], dim=d)
    return weights


MEMORY = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch_last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda t: torch.cat([torch.full_like(t, torch.nan), t, torch.full_like(t, torch.nan)], -1)[
        ..., t.shape[-1] : 2 * t.shape[-1]
    ],
    "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
}
