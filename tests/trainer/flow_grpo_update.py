"""The gradients of Flow-GRPO's loss, written without the driver."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
from doubled import doubled, rolled_out
from torch import Tensor

from star_trainer.config import Config
from star_trainer.samples import Batch
from star_trainer.trainer import Trainer

ADVANTAGES = torch.tensor([1.2, -0.7, -0.5, 9.0, 0.0, -1.0], dtype=torch.float64)


def gradients(
    trainer: Trainer, batch: Batch, advantages: Tensor, config: Config, velocity_of: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Flow-GRPO (arXiv 2505.05470), equations 9 and 12, with the means of its published code.

    Args:
        velocity_of: the guided velocity at a sample and a noise level.
    """
    policy, train = trainer.policy, config.train
    sigmas = policy.pipeline.scheduler.sigmas.double()
    parameters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    total = torch.zeros((), dtype=torch.float64)

    def mean_of(step: Any) -> tuple[Tensor, float, float]:
        sigma, after = float(sigmas[step.number]), float(sigmas[step.number + 1])
        level = sigma if sigma < 1 else float(sigmas[1])
        noise, dt = config.rollout.noise_level * sqrt(sigma / (1 - level)), after - sigma
        x, velocity = step.sample.double(), velocity_of(step.sample, sigmas[step.number]).double()
        mean = x * (1 + noise**2 / (2 * sigma) * dt) + velocity * (1 + noise**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, noise, noise * sqrt(-dt)

    for step in batch.steps:
        mean, noise, std = mean_of(step)
        with torch.no_grad():
            policy.model.disable_adapters()
            ref_mean, *_ = mean_of(step)
            policy.model.enable_adapters()
        log_prob = (-((step.prev_sample.double() - mean) ** 2) / (2 * std**2)).mean(dim=(1, 2, 3))
        ratio = (log_prob - log_prob.detach()).exp()
        limited = advantages.double().clamp(-train.advantage_clip, train.advantage_clip)
        clipped = ratio.clamp(1 - train.clip_range, 1 + train.clip_range)
        policy_loss = torch.maximum(-limited * ratio, -limited * clipped).mean()
        kl = ((mean - ref_mean) ** 2 / (2 * noise**2)).mean()  # without dt
        total = total + (policy_loss + train.kl_coef * kl) / len(batch.steps)
    found = torch.autograd.grad(total, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def check_update(
    trainer: Trainer, config: Config, velocity_of: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asserts that the gradients of the driver's update are those of Flow-GRPO, within 1e-6."""
    with torch.no_grad():  # adapters are initialised to zero, so that the KL term would be zero
        for parameter in trainer.average.parameters.values():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    batch = doubled(trainer, rolled_out(trainer, config), monkeypatch)
    expected = gradients(trainer, batch, ADVANTAGES, config, velocity_of)
    trainer.updater.gradients([batch], ADVANTAGES)
    size = max(float(g.abs().max()) for g in expected.values())
    assert size > 1e-5
    error = max(float((p.grad - expected[n]).abs().max()) for n, p in trainer.average.parameters.items())
    assert error <= 1e-6 * size, (error, size)
