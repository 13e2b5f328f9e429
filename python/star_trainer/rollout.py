"""Rollouts: samples of an epoch's prompts, and what the update has to know of their trained steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from star_kernels import TokenSelection, allocate, sample_transition, total_variation
from star_kernels.capture import attach_maps
from star_kernels.prompts import regions_of, select_tokens
from star_trainer.config import Allocation, Config
from star_trainer.credit import cores_of, phrase_shares
from star_trainer.policy import Policy, Text
from star_trainer.prompts import Prompt
from star_trainer.schedule import Schedule, noise, noisy_steps, schedule_of, trained_steps


@dataclass(frozen=True)
class Step:
    """A trained step of a batch: the latents before and after it, and the policy that chose them."""

    number: int
    sample: Tensor  # [B, C, h, w]
    prev_sample: Tensor
    log_prob: Tensor  # [B, h, w]
    model_output: Tensor | None  # kept for ratio_norm
    weights: Tensor | None  # [B, rows, columns] of patches; of the advantages of phrases [B, G, rows, columns]

    def at(self, rows: slice) -> Step:
        """The step of some of its samples."""
        return replace(
            self,
            sample=self.sample[rows],
            prev_sample=self.prev_sample[rows],
            log_prob=self.log_prob[rows],
            model_output=None if self.model_output is None else self.model_output[rows],
            weights=None if self.weights is None else self.weights[rows],
        )


@dataclass(frozen=True)
class Batch:
    """Samples that went through the model together.

    Attributes:
        shares: with credit by phrase, the share of each phrase's advantage in its sample's loss.
    """

    numbers: list[int]
    prompts: list[Prompt]
    text: Text
    steps: list[Step]
    images: Tensor  # [B, 3, H, W] in 0..1
    shares: Tensor | None = None  # [B, G]


def roll_out(
    policy: Policy, prompts: Sequence[Prompt], numbers: Sequence[int], config: Config, epoch: int, autocast: Any
) -> Batch:
    """Draws the samples of these numbers.

    Args:
        prompts: of each sample.
        numbers: of the samples in their epoch.
        autocast: makes the context of the forward passes.
    """
    schedule = schedule_of(policy.pipeline, config.rollout.steps)
    noisy, trained = noisy_steps(config, epoch), trained_steps(config, epoch)
    shape = policy.latent_shape(config.rollout.resolution)
    seed = f"{config.train.seed} {epoch}"
    starts = [n // config.rollout.group_size if config.rollout.shared_noise else n for n in numbers]
    latents = noise(shape, [f"start {seed} {n}" for n in starts], policy.device)
    text = policy.encode([prompt.text for prompt in prompts])
    selection = select(policy, prompts, config.allocation, shape) if config.allocation.method == "star" else None
    shares = None
    if selection is not None and config.allocation.credit != "image":
        shares = phrase_shares(selection, config.allocation)
    steps: list[Step] = []
    following = [step + 1 for step in trained] if config.allocation.over == "change" else []
    maps: dict[int, Tensor] = {}  # by step
    capturing = nullcontext() if selection is None else capture(policy, selection, config)
    with torch.no_grad(), capturing as handle:
        for step in range(schedule.steps):
            if handle is not None:
                handle.enabled = step in trained or step in following
            with autocast():
                velocity = policy.velocity(latents, schedule.timestep(step), text)
            if handle is not None and handle.enabled:
                taken = handle.take()
                maps[step] = taken[:, 0] if shares is None else taken
            if step not in noisy:
                latents = schedule.plain_step(step, latents, velocity)
                continue
            transition = schedule.transition(step, config, len(numbers), policy.device)
            drawn, log_prob = sample_transition(
                velocity,
                latents,
                transition,
                noise=noise(shape, [f"step {step} {seed} {n}" for n in numbers], policy.device),
            )
            if step in trained:
                kept = velocity if config.train.ratio_norm else None
                steps.append(Step(step, latents, drawn, log_prob, kept, None))
            latents = drawn
    if maps:
        own, then = ([maps[step] for step in chosen] for chosen in (trained, following))
        after = torch.stack(then, dim=1) if then else None
        steps = weighted(steps, torch.stack(own, dim=1), config.allocation, after)
    return Batch(list(numbers), list(prompts), text, steps, policy.decode(latents), shares)


def select(
    policy: Policy, prompts: Sequence[Prompt], allocation: Allocation, shape: tuple[int, int, int]
) -> TokenSelection:
    """The tokens of the prompts' core content; with credit by phrase in a group for each phrase."""
    patch = policy.model.config.patch_size
    regions = regions_of(policy.pipeline, max_sequence_length=policy.text_length)
    cores = cores_of(prompts, allocation)
    selection, names = select_tokens(
        cores,
        regions,
        per_phrase=allocation.credit != "image",
        image_tokens=(shape[1] // patch) * (shape[2] // patch),
    )
    if allocation.credit != "image":
        # Where truncation leaves none of a prompt's phrases, all its words are selected: no phrase's map.
        own = torch.tensor([found == core.names for found, core in zip(names, cores, strict=True)])
        selection = replace(selection, weight=selection.weight * own[:, None, None])
    return selection.to(policy.device)


def capture(policy: Policy, selection: TokenSelection | None, config: Config) -> Any:
    return attach_maps(
        policy.transformer,
        selection,
        blocks=config.allocation.blocks,
        cfg="last" if config.rollout.guidance > 1 else None,
    )


@torch.no_grad()
def sample(policy: Policy, prompts: Sequence[Prompt], names: Sequence[str], config: Config, autocast: Any) -> Tensor:
    """Images without noise on the way, for evaluation; each starts from the noise of its name."""
    schedule: Schedule = schedule_of(policy.pipeline, config.evaluation.steps)
    latents = noise(policy.latent_shape(config.rollout.resolution), names, policy.device)
    text = policy.encode([prompt.text for prompt in prompts])
    for step in range(schedule.steps):
        with autocast():
            velocity = policy.velocity(latents, schedule.timestep(step), text)
        latents = schedule.plain_step(step, latents, velocity)
    return policy.decode(latents)


def weighted(steps: list[Step], maps: Tensor, allocation: Allocation, following: Tensor | None = None) -> list[Step]:
    """Steps with their weights, from maps ``[B, Steps, rows, columns]``, of phrases ``[B, Steps, G, rows, columns]``.

    Where the picture's advantage is split, what is no phrase's comes first and acts by the map of all phrases; at each
    position the phrases' parts act by the same weight times their shares of the attention there.

    Args:
        following: the maps of the step after each, for ``over`` "change".
    """
    splits = allocation.credit == "split"
    found = maps.sum(dim=2) if splits else maps
    layout = "bshw" if found.ndim == 4 else "bsghw"
    signal = None
    if following is not None:
        signal = total_variation(found, following.sum(dim=2) if splits else following, layout=layout)
    weights = allocate(
        found,
        layout=layout,
        strength=allocation.strength,
        over="trajectory" if allocation.over == "change" else allocation.over,
        cap=allocation.cap,
        step_signal=signal,
    )
    if splits:
        total = found[:, :, None]
        shares = torch.where((total > 0) & total.isfinite(), maps / total, 1.0)
        each = weights[:, :, None] * torch.lerp(torch.ones_like(shares), shares, allocation.strength)
        weights = torch.cat([weights[:, :, None], each], dim=2)
    return [replace(step, weights=weights[:, i].contiguous()) for i, step in enumerate(steps)]
