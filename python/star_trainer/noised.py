"""Trained steps of the forward process ("nft" and "awm"): noised samples instead of the steps of a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from star_kernels.integrations.flow_grpo_policy import log_prob_of
from star_trainer.config import Config
from star_trainer.objectives import OLD_OUTPUT
from star_trainer.policy import Policy, Text
from star_trainer.samples import Step
from star_trainer.schedule import Schedule, noise


@torch.no_grad()
def noised_step(
    policy: Policy,
    schedule: Schedule,
    step: int,
    latents: Tensor,
    names: Sequence[str],
    text: Text,
    config: Config,
    autocast: Any,
) -> Step:
    """Drawn samples x0 at the noise level of a step, and what the loss needs of the policy that drew them.

    With fresh noise eps: ``sample = (1 - sigma) x0 + sigma eps``, and the target ``prev_sample = eps - x0``.

    Args:
        names: of each sample, the name that its noise follows from.
        autocast: returns a context for the forward pass.
    """
    eps = noise(latents.shape[1:], names, policy.device)
    sample, target = torch.lerp(latents.float(), eps, schedule.sigmas[step]), eps - latents.float()
    with autocast():
        velocity = policy.velocity(sample, schedule.timestep(step), text)
    transition = schedule.transition(step, config, len(latents), policy.device)
    log_prob = log_prob_of(velocity.float(), target, transition, 1)
    return Step(step, sample, target, log_prob, velocity if config.train.objective in OLD_OUTPUT else None, None)
