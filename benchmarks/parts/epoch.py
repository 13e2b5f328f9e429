"""The cost of STAR in an epoch of star-train: rollout, rewards and update of the small model in the package.

It is measured in two ways: as the ratio of whole epochs with and without STAR, which is noisy on a shared machine, and
as the sum of the parts that STAR adds to an epoch, each timed many times, relative to an epoch without STAR.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks.parts.request import Request
from benchmarks.timing.clocks import CpuClock
from benchmarks.timing.harness import Budget, Figure, Variant, interleave
from benchmarks.timing.memory import peak_memory
from benchmarks.timing.progress import Progress
from star_kernels import weighted_policy_loss
from star_trainer.command import PRESETS
from star_trainer.config import Config
from star_trainer.credit import capture, select, weights_of
from star_trainer.prompts import choose
from star_trainer.trainer import Trainer

GROUPS = {"default": 4, "thorough": 8}  # the work of an epoch is proportional to the number of groups
QUICK = {"groups": 1, "group_size": 2, "batch": 2}


def measure(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one case, always in float32, which is the only dtype that the small model is trained in."""
    transformers_logging.disable_progress_bar()  # when the model is loaded
    preset = _preset("small")
    quick = request.extent == "quick"
    changes = QUICK if quick else {"groups": GROUPS[request.extent], "batch": request.batch or preset.rollout.batch}
    config = replace(
        preset,
        rollout=replace(preset.rollout, **changes),
        evaluation=replace(preset.evaluation, every=0, prompts=1),
        output=replace(preset.output, images_every=0, trackers=[]),
    )
    with tempfile.TemporaryDirectory() as folder:
        yield measure_case(config, request.device, request.budget, folder, quick)


def measure_case(config: Config, device: torch.device, budget: Budget, folder: str, quick: bool) -> dict[str, Any]:
    title = f"epoch of star-train · small model · {config.rollout.groups} groups of {config.rollout.group_size}"
    with Progress(f"{title} · building", 0):
        trainers = {method: _trainer(config, method, device, folder) for method in ("plain", "star")}
    variants = [
        Variant("plain", "epoch with plain Flow-GRPO", trainers["plain"].train_epoch),
        Variant("star", "epoch with STAR", trainers["star"].train_epoch),
    ]
    clock = CpuClock(device)
    with Progress(f"{title} · memory", 0):  # also warms up both trainers
        peaks = {method: peak_memory(trainer.train_epoch, device) for method, trainer in trainers.items()}
    times = interleave(variants, clock, budget.share(0.7), title, warm_up=0)
    parts = added(trainers["star"], clock, replace(budget, seconds=0.3 * budget.seconds))
    plain = times.figure("plain").median
    known = all(figure.low is not None for _, figure in parts.values())
    bounds = ("median", "low", "high") if known else ("median",)
    return {
        "name": "smoke test" if quick else "epoch of the driver",
        "title": f"star-train, preset small, float32: {config.rollout.groups} groups of {config.rollout.group_size}, "
        f"{config.rollout.steps} steps, {config.rollout.window or config.rollout.steps - 1} of them trained",
        "dtype": "float32",
        "clock": clock.name,
        **times.columns(variants, "plain"),
        "ratios": {
            "star_over_plain": {
                "label": "OVERHEAD epoch with STAR / without",
                **times.ratio("star", "plain").as_dict(),
            },
            "star_by_parts": {
                "label": "OVERHEAD (epoch + the parts that STAR adds) / epoch",
                **{
                    bound: 1 + sum(count * getattr(figure, bound) for count, figure in parts.values()) / plain
                    for bound in bounds  # conservative: all parts at their bounds at once
                },
                "count": min(figure.count for _, figure in parts.values()),
                "calm": all(figure.calm for _, figure in parts.values()),
            },
            "star_memory": {
                "label": "peak extra memory: with STAR / without",
                "median": peaks["star"] / peaks["plain"],
            },
        },
        "added": {name: {"times": count, **figure.as_dict()} for name, (count, figure) in parts.items()},
        "notes": [*filter(None, (times.note,))],
    }


def added(trainer: Trainer, clock: CpuClock, budget: Budget) -> dict[str, tuple[int, Figure]]:
    """The parts that STAR adds to an epoch. Maps a name to the number of calls per epoch and the seconds per call.

    The parts are the selection of the prompts' tokens, the maps of a forward pass, the weights computed from the maps,
    and the additional time of a loss with weights, forward and backward.
    """
    config, policy = trainer.config, trainer.policy
    size = config.rollout.group_size
    chosen = choose(trainer.prompts, config.rollout.groups, 0, config.train.seed)
    prompts = [prompt for prompt in chosen for _ in range(size)][: config.rollout.batch]
    count = len(prompts)
    batch = trainer.roll_out(prompts, range(count))
    selection = select(policy, prompts, config.allocation)
    schedule = policy.schedule(config.rollout.steps)
    step, advantages = batch.steps[0], torch.linspace(-1, 1, count, device=policy.device)
    assert step.weights is not None
    maps = torch.rand(count, len(batch.steps), *step.weights.shape[1:], device=policy.device)
    transition = schedule.transition(step.number, config, count, policy.device)
    velocity = torch.randn_like(step.sample)

    def forward(handle: Any, enabled: bool) -> None:
        handle.enabled = enabled
        policy.velocity(step.sample, schedule.timestep(step.number), batch.text)
        if enabled:
            handle.take()

    def loss(weights: Tensor | None) -> None:
        leaf = velocity.detach().requires_grad_()
        found = weighted_policy_loss(
            leaf, step.sample, step.prev_sample, step.log_prob, advantages, transition, weights=weights
        )
        found.loss.backward()

    with torch.no_grad(), capture(policy, selection, config) as handle:
        variants = [
            Variant("forward", "forward pass", lambda: forward(handle, False)),
            Variant("maps", "forward pass with maps", lambda: forward(handle, True)),
            Variant("selection", "token selection", lambda: select(policy, prompts, config.allocation)),
            Variant("weights", "weights from maps", lambda: weights_of(maps, config.allocation)),
            Variant("plain loss", "loss", torch.enable_grad()(lambda: loss(None))),
            Variant("loss", "loss with weights", torch.enable_grad()(lambda: loss(step.weights))),
        ]
        times = interleave(variants, clock, budget, "epoch of star-train · parts", warm_up=2)
    batches = -(-config.samples // count)
    passes = batches * len(batch.steps)
    return {
        "selection": (batches, times.figure("selection")),
        "maps": (passes, times.difference("maps", "forward")),
        "weights": (batches, times.figure("weights")),
        "loss": (passes * config.train.passes, times.difference("loss", "plain loss")),
    }


def _preset(name: str) -> Config:
    made = Config()
    values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    return replace(made, **{part: replace(getattr(made, part), **options) for part, options in values.items()})


def _trainer(config: Config, method: Any, device: torch.device, folder: str) -> Trainer:
    chosen = replace(
        config,
        allocation=replace(config.allocation, method=method),
        output=replace(config.output, folder=f"{folder}/{method}"),
    )
    return Trainer(chosen, Accelerator(cpu=device.type == "cpu"), progress=False)
