"""Rollouts: draws the samples of an epoch, and images for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from star_kernels import sample_transition
from star_trainer.config import Config
from star_trainer.credit import RolloutMaps
from star_trainer.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.samples import Batch, Step
from star_trainer.schedule import noise, noisy_steps, schedule_of, trained_steps


def roll_out(
    policy: Policy, prompts: Sequence[Prompt], numbers: Sequence[int], config: Config, epoch: int, autocast: Any
) -> Batch:
    """Draws one sample for each prompt.

    Args:
        prompts: prompt of each sample.
        numbers: index of each sample within its epoch, from which its noise follows.
        autocast: returns a context for the forward passes.
    """
    schedule = schedule_of(policy.pipeline, config.rollout.steps)
    noisy, trained = noisy_steps(config, epoch), trained_steps(config, epoch)
    drawn = config.output.draws(epoch + 1) and config.allocation.over == "step"
    shown = sorted({schedule.steps // 2, schedule.steps - 1} - {*trained}) if drawn else []
    shape = policy.latent_shape(config.rollout.resolution)
    seed = f"{config.train.seed} {epoch}"
    starts = [n // config.rollout.group_size if config.rollout.shared_noise else n for n in numbers]
    latents = noise(shape, [f"start {seed} {n}" for n in starts], policy.device)
    text = policy.encode([prompt.text for prompt in prompts])
    steps: list[Step] = []
    with torch.no_grad(), RolloutMaps(policy, prompts, trained, config, shown) as maps:
        for step in range(schedule.steps):
            with maps.of(step), autocast():
                velocity = policy.velocity(latents, schedule.timestep(step), text)
            if step not in noisy:
                latents = schedule.ode_step(step, latents, velocity)
                continue
            transition = schedule.transition(step, config, len(numbers), policy.device)
            prev_sample, log_prob = sample_transition(
                velocity,
                latents,
                transition,
                noise=noise(shape, [f"step {step} {seed} {n}" for n in numbers], policy.device),
            )
            if step in trained:
                kept = velocity if config.train.ratio_norm else None
                steps.append(Step(step, latents, prev_sample, log_prob, kept, None))
            latents = prev_sample
    images = policy.decode(latents)
    return Batch(list(numbers), list(prompts), text, maps.weigh(steps), images, maps.shares, maps.weigh_shown())


@torch.no_grad()
def sample(policy: Policy, prompts: Sequence[Prompt], names: Sequence[str], config: Config, autocast: Any) -> Tensor:
    """Images drawn by ODE steps, for evaluation; the initial noise of each image follows from its name."""
    schedule = schedule_of(policy.pipeline, config.evaluation.steps)
    latents = noise(policy.latent_shape(config.rollout.resolution), names, policy.device)
    text = policy.encode([prompt.text for prompt in prompts])
    for step in range(schedule.steps):
        with autocast():
            velocity = policy.velocity(latents, schedule.timestep(step), text)
        latents = schedule.ode_step(step, latents, velocity)
    return policy.decode(latents)
