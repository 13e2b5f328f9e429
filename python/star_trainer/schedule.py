"""The noise levels of a rollout, its SDE steps and trained steps, and the random numbers of each sample.

Everything is a function of the seed, the epoch and the sample's number, without state: the results do not depend on
resuming a run or on the number of processes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_kernels import Transition, dance_sde, flow_cps, flow_matching, flow_sde
from star_trainer.config import Config
from star_trainer.objectives import FORWARD, step_weights


@dataclass(frozen=True)
class Schedule:
    """The noise levels ``sigmas`` of a rollout: one more than its steps, in decreasing order down to zero."""

    sigmas: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def timestep(self, step: int) -> float:
        return 1000 * self.sigmas[step]

    def ode_step(self, step: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """The latents after an ODE step (Euler's method), float32."""
        return latents + (self.sigmas[step + 1] - self.sigmas[step]) * velocity.float()

    def transition(self, step: int, config: Config, batch: int, device: torch.device) -> Transition:
        """The SDE transition of a step, or the flow matching of its noise level."""
        if config.train.objective in FORWARD:
            return flow_matching(torch.full((batch,), self.sigmas[step], device=device))
        here, then = (torch.full((batch,), s, device=device) for s in self.sigmas[step : step + 2])
        level = config.rollout.noise_level
        match config.rollout.transition:
            case "flow_sde":
                return flow_sde(here, then, noise_level=level, sigma_max=self.sigmas[1])
            case "flow_cps":
                return flow_cps(here, then, noise_level=level)
            case "dance_sde":
                return dance_sde(here, then, eta=level)

    def step_weights(self, config: Config) -> list[float] | None:
        """The factors of the losses of all steps but the last; None is uniform."""
        steps = range(self.steps - 1)
        match step_weights(config.train):
            case "noise":
                found = [float(self.transition(step, config, 1, torch.device("cpu")).std) for step in steps]
                return [std * len(found) / sum(found) for std in found]
            case "time":
                return [1 / (self.sigmas[step] - self.sigmas[step + 1]) for step in steps]
        return None


def schedule_of(
    pipeline: Any, steps: int, *, sigmas: Sequence[float] | None = None, tokens: int | None = None
) -> Schedule:
    """The noise levels of the pipeline's scheduler, including its shift.

    Args:
        sigmas: noise levels before the shift; None are the scheduler's own.
        tokens: number of tokens of an image, on which the shift of some schedulers depends (``use_dynamic_shifting``).
    """
    scheduler, options = pipeline.scheduler, dict[str, Any]()
    config = scheduler.config
    if config.use_dynamic_shifting and tokens is not None:
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        options["mu"] = tokens * slope + (config.base_shift - slope * config.base_image_seq_len)
    scheduler.set_timesteps(steps, sigmas=sigmas, **options)
    return Schedule(tuple(float(s) for s in scheduler.sigmas))


def noisy_steps(config: Config, epoch: int) -> list[int]:
    """The SDE steps of an epoch: a window at a random position, or all steps."""
    window = config.rollout.window
    if window is None:
        return list(range(config.rollout.steps))
    end = config.rollout.window_end or config.rollout.steps - 1
    first = random.Random(f"window {config.train.seed} {epoch}").randint(0, end - window)
    return list(range(first, first + window))


def trained_steps(config: Config, epoch: int) -> list[int]:
    """The SDE steps that are trained; never the last step, whose variance is almost zero."""
    steps = [step for step in noisy_steps(config, epoch) if step < config.rollout.steps - 1]
    if config.train.steps is None or config.train.steps >= len(steps):
        return steps
    return sorted(random.Random(f"steps {config.train.seed} {epoch}").sample(steps, config.train.steps))


def shares(config: Config, epoch: int, processes: int, rank: int) -> list[list[int]]:
    """The numbers of a process's samples, one list for each optimiser step of a pass.

    Samples are numbered group after group and distributed in random order, so that each step sees all groups.
    """
    order = list(range(config.samples))
    random.Random(f"samples {config.train.seed} {epoch}").shuffle(order)
    share = config.samples // (config.train.updates * processes)
    starts = [(update * processes + rank) * share for update in range(config.train.updates)]
    return [order[start : start + share] for start in starts]


def noise(shape: Sequence[int], names: Sequence[str], device: torch.device) -> Tensor:
    """Standard normal numbers, float32 ``[B, *shape]``; each row is seeded by its name."""
    rows = [
        torch.randn(*shape, generator=torch.Generator().manual_seed(random.Random(name).getrandbits(63)))
        for name in names
    ]
    return torch.stack(rows).to(device)
