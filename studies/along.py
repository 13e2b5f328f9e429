"""Measures allocations along the gradient of plain Flow-GRPO from many samples: python -m studies.along

Which allocation does most for the reward where the image lacks an object of its prompt? For each batch of samples the
study computes how much a step with the gradient of an allocation changes the objective of plain Flow-GRPO, per unit of
the step's length. The gradient of that objective comes from the samples of other batches: batches with even numbers use
that of the odd ones, and the reverse. A step divides each entry of a gradient by its root mean square under plain
Flow-GRPO, nearly as Adam does.

With u the gradient of plain Flow-GRPO from many samples, g that of an allocation from one batch, and D the scale:

    progress    mean of <D g, u>
    efficiency  progress / sqrt(mean of <D g, D g>), relative to that of plain Flow-GRPO

As long as noise is most of g, the cosine between D g and u grows with the square root of the number of samples, so a
step of an allocation with an efficiency r is as good as one of plain Flow-GRPO with r * r times the samples. Both
values are also computed for steps from those samples alone in which all objects of the prompt are found, and from
those alone in which one is missing.

Progress needs no gradient of an allocation: it is the sum over positions of the weights times the derivative of the
loss at that position along D u, which two forward passes give for all allocations. <D g, D g> is measured with a few
batches. Intervals are jackknife intervals over batches, given the two gradients u. Units that the JSON file already
has with all batches are not measured again; --report only prints them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from benchmarks.reporting import environment
from star_kernels import allocate
from star_trainer.command import parse as parse_settings
from star_trainer.config import Config
from star_trainer.policy import Policy
from star_trainer.prompts import Prompt, choose, load_prompts
from star_trainer.scenes import check
from star_trainer.scenes.detect import detect_shapes
from star_trainer.schedule import schedule_of
from studies import agreement, allocations, cosines
from studies.efficiency import CLASSES, FIRST, WHOLE, efficiency, gain, names

DESIGN = Path(__file__).parent / "designs" / "missing.yaml"
RESULT = Path(__file__).parent / "results" / "missing-objects.json"
LENGTH = 1e-4  # of the finite difference along a direction with entries of about one


@dataclass
class Measured:
    """A batch: its trained steps, the slope of the plain loss in each, and the weights of every allocation.

    Attributes:
        samples: ``[Steps, N, C, h, w]``.
        slopes: ``[Steps, N, C, h, w]``, the gradient of the plain loss with respect to the velocity.
        weights: ``[N, Steps, P]`` for each allocation.
        missing: ``[N]``, whether an object of the prompt is missing.
    """

    numbers: list[int]
    text: Any
    samples: Tensor
    slopes: Tensor
    weights: dict[str, Tensor]
    missing: Tensor


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    design = yaml.safe_load(options.design.read_text())
    found = json.loads(options.out.read_text()) if options.out.exists() else {"units": []}
    deadline = time.monotonic() + 60 * options.minutes
    if not options.report:
        for name, settings in design["settings"].items():
            key = {"name": name, **{k: v for k, v in design.items() if k != "settings"}, "settings": settings}
            others = [unit for unit in found["units"] if unit["key"] != key]
            ended = any(unit["key"] == key and len(unit["batches"]) == key["batches"] for unit in found["units"])
            if not ended and time.monotonic() < deadline:
                found["units"] = [*others, {"key": key, **measure(design, settings, deadline)}]
                options.out.write_text(json.dumps(found) + "\n")
    for unit in found["units"]:
        print(text(unit))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.along", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--design", type=Path, default=DESIGN, help="YAML file of the design")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file of the results")
    parser.add_argument("--minutes", type=float, default=math.inf, help="minutes after which no batch is started")
    parser.add_argument("--report", action="store_true", help="only print the results in the JSON file")
    return parser.parse_args(arguments)


def measure(design: Mapping[str, Any], settings: Mapping[str, Any], deadline: float) -> dict[str, Any]:
    """Progress and size of the update of every allocation, by batch; fewer batches if the deadline passes."""
    started = time.perf_counter()
    values = {
        "rollout.groups": design["groups"],
        "rollout.group_size": design["group_size"],
        "train.seed": design["seed"],
        **settings,
    }
    config = parse_settings(["--preset", "small", *(f"--{name}={value}" for name, value in values.items())])
    policy = Policy(config, torch.device("cpu"))
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    prompts = load_prompts(config.data.prompts, seed="missing objects")
    batches: list[Measured] = []
    plain: list[Tensor] = []
    described: list[dict[str, Any]] = []
    for number in tqdm(range(design["batches"]), desc="plain gradients", mininterval=10):
        if number >= 4 and number % 2 == 0 and time.monotonic() > deadline:
            break
        batch, about = _roll_out(policy, prompts, config, number)
        plain.append(_gradients(policy, config, batch, parameters, batch.slopes[None])[1][0])
        batches.append(batch)
        described.append(about)
    scale = cosines.adam_scale(plain)
    directions = [torch.stack(plain[fold::2]).mean(dim=0) * scale for fold in (0, 1)]
    progress: dict[str, dict[str, list[list[float]]]] = {}
    exact, approximate = (
        list[float](),
        list[float](),
    )  # progress of plain Flow-GRPO from its gradient, and from finite differences
    for number, batch in enumerate(tqdm(batches, desc="progress", mininterval=10)):
        slope = derivative(policy, config, batch, parameters, directions[1 - number % 2])  # [N, Steps, P]
        exact.append(plain[number].dot(directions[1 - number % 2]).item())
        approximate.append(slope.sum().item())
        for name, weights in batch.weights.items():
            own = (slope * weights).sum(dim=2)  # [N, Steps]
            for kind, chosen in _classes(batch.missing):
                progress.setdefault(name, {}).setdefault(kind, []).append(own[chosen].sum(dim=0).tolist())
    sizes = [
        _sizes(policy, config, batch, parameters, scale, design["samples_for_size"])
        for batch in tqdm(
            batches[: -(-len(batches) * design["batches_for_size"] // design["batches"])], desc="sizes", mininterval=10
        )
    ]
    return {
        "environment": environment.describe(torch.device("cpu")),
        "seconds": round(time.perf_counter() - started, 1),
        "difference_error": math.dist(exact, approximate) / math.hypot(*exact),
        "agreement": cosines.agreement(torch.stack(plain), scale=scale),
        "batches": described,
        "progress": progress,
        "atoms": [f"{name}, {kind}" for name in batches[0].weights for kind in CLASSES],
        "sizes": sizes,
    }


def _roll_out(policy: Policy, prompts: list[Prompt], config: Config, number: int) -> tuple[Measured, dict[str, Any]]:
    """A batch, and the numbers that describe it."""
    drawn = choose(prompts, config.rollout.groups, number, config.train.seed)
    rolled = allocations.roll_out(policy, drawn, config, number, Accelerator(cpu=True).autocast)
    batch = rolled.batch
    verdicts = check(batch.images, [p.metadata for p in batch.prompts])
    advantages, _, _ = agreement.credit(verdicts.graded, verdicts.phrases, config)
    lacking = missing(batch.images, batch.prompts)
    blocks = config.allocation.blocks
    assert isinstance(blocks, list)  # as the preset has them
    maps, weights = weights_of(rolled, verdicts.graded, blocks, number)
    schedule = schedule_of(policy.pipeline, config.rollout.steps)
    slopes = []
    for step in batch.steps:
        with torch.no_grad():
            velocity = policy.velocity(step.sample, schedule.timestep(step.number), batch.text)
        transition = schedule.transition(step.number, config, len(batch.numbers), policy.device)
        ones = torch.ones_like(weights["plain"][:, 0])
        slopes.append(agreement.slope_of(velocity, step, transition, advantages, ones))
    mask = allocations.object_mask(batch)[:, None]
    about = {
        "reward": round(verdicts.graded.mean().item(), 4),
        "exact": round(verdicts.exact.float().mean().item(), 4),
        "missing": round(lacking.float().mean().item(), 4),
        "advantage": {k: round(advantages[c].mean().item(), 4) for k, c in _classes(lacking)},
        "uncolored": round((mask.sum(dim=(1, 2)) == 0).float().mean().item(), 4),
        "localization": {
            name: {kind: _means(_correlation(own, mask), chosen) for kind, chosen in _classes(lacking)}
            for name, own in maps.items()
        },
    }
    measured = Measured(
        [step.number for step in batch.steps],
        batch.text,
        torch.stack([step.sample for step in batch.steps]),
        torch.stack(slopes),
        weights,
        lacking,
    )
    return measured, about


def missing(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Whether an object that the prompt names, of its shape and color, is nowhere in the image, bool ``[N]``."""
    return torch.tensor(
        [
            any(all((d.name, d.color) != (e["class"], e["color"]) for d in found) for e in prompt.metadata["include"])
            for found, prompt in zip(detect_shapes(images), prompts, strict=True)
        ]
    )


def weights_of(
    rolled: allocations.Rollout, rewards: Tensor, blocks: Sequence[int], seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Maps and weights ``[N, Steps, P]`` of the allocations that are compared, for the maps of the given blocks."""
    own = rolled.phrases.sum(dim=3)[:, :, blocks].mean(dim=2)
    everything = rolled.everything[:, :, blocks].mean(dim=2)
    maps = {
        "map": own,
        "group mean": _of_group(own, torch.ones_like(rewards), rolled.group_size),
        "best sample": _of_group(own, _best(rewards, rolled.group_size), rolled.group_size),
        "sharpened": (_unit(own) - _unit(everything)).clamp(min=0),
    }
    weights = {name: allocate(found, layout="bsp") for name, found in maps.items()}
    mask = allocations.object_mask(rolled.batch)[:, None].expand_as(own)
    generator = torch.Generator().manual_seed(seed)
    return maps, {
        "plain": torch.ones_like(own),
        **weights,
        "map, over the trajectory": allocate(own, layout="bsp", over="trajectory"),
        "object mask (oracle)": allocate(mask, layout="bsp"),
        "shuffled": allocations.shuffled(weights["map"], generator),
    }


def _of_group(maps: Tensor, shares: Tensor, size: int) -> Tensor:
    """For each sample the mean map of its group, weighted by ``shares`` ``[N]``."""
    grouped, weight = maps.unflatten(0, (-1, size)), shares.view(-1, size, 1, 1)
    mean = (grouped * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
    return mean.expand_as(grouped).flatten(0, 1)


def _best(rewards: Tensor, size: int) -> Tensor:
    """1 for the samples with the highest reward of their group, else 0."""
    grouped = rewards.view(-1, size)
    return (grouped == grouped.amax(dim=1, keepdim=True)).float().flatten()


def _unit(maps: Tensor) -> Tensor:
    return maps / maps.mean(dim=2, keepdim=True)


def _gradients(
    policy: Policy, config: Config, batch: Measured, parameters: Sequence[Tensor], slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients ``[K, D]`` for slopes ``[K, Steps, N, C, h, w]``, summed over the first two steps and over all."""
    schedule = schedule_of(policy.pipeline, config.rollout.steps)
    count = slopes.shape[2]
    text = batch.text[:count]
    total = torch.zeros(len(slopes), sum(p.numel() for p in parameters))
    first = total
    for at, number in enumerate(batch.numbers):
        velocity = policy.velocity(batch.samples[at, :count], schedule.timestep(number), text)
        for i, own in enumerate(slopes[:, at]):
            kept = i < len(slopes) - 1
            found = torch.autograd.grad(velocity, parameters, own, retain_graph=kept, materialize_grads=True)
            total[i] += torch.cat([gradient.flatten() for gradient in found])
        if at == 1:
            first = total.clone()
    return first, total


@torch.no_grad()
def derivative(
    policy: Policy, config: Config, batch: Measured, parameters: Sequence[Tensor], direction: Tensor
) -> Tensor:
    """The derivative of the plain loss along a direction of the parameters, at each position: ``[N, Steps, P]``."""
    schedule = schedule_of(policy.pipeline, config.rollout.steps)
    original = [p.clone() for p in parameters]
    steps = [d.view_as(p) for d, p in zip(direction.split([p.numel() for p in parameters]), parameters, strict=True)]
    found = []
    for at, number in enumerate(batch.numbers):
        ends = []
        for sign in (1, -1):
            for parameter, start, step in zip(parameters, original, steps, strict=True):
                parameter.copy_(start + sign * LENGTH * step)
            ends.append(policy.velocity(batch.samples[at], schedule.timestep(number), batch.text))
        change = (ends[0] - ends[1]) / (2 * LENGTH)
        # A position of the weights is a patch of 2 x 2 latents.
        found.append(4 * F.avg_pool2d((change * batch.slopes[at]).sum(dim=1, keepdim=True), 2).flatten(1))
    for parameter, start in zip(parameters, original, strict=True):
        parameter.copy_(start)
    return torch.stack(found, dim=1)


def _sizes(
    policy: Policy, config: Config, batch: Measured, parameters: Sequence[Tensor], scale: Tensor, count: int
) -> dict[str, list[list[float]]]:
    """Inner products <D g, D g'> of the gradients of all allocations, each from one class of the first samples."""
    side = batch.samples.shape[-1] // 2
    slopes = []
    for weights in batch.weights.values():
        on_latents = weights.unflatten(2, (side, side)).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        weighted = batch.slopes * on_latents.movedim(1, 0)[:, :, None]
        slopes += [(weighted * chosen.view(1, -1, 1, 1, 1))[:, :count] for _, chosen in _classes(batch.missing)]
    gradients = _gradients(policy, config, batch, parameters, torch.stack(slopes))
    scaled = [gradient * scale for gradient in gradients]
    return {part: (own @ own.T).tolist() for part, own in zip((FIRST, WHOLE), scaled, strict=True)}


def _classes(lacking: Tensor) -> list[tuple[str, Tensor]]:
    return list(zip(CLASSES, (~lacking, lacking), strict=True))


def _means(values: Tensor, chosen: Tensor) -> list[float]:
    """Means over the chosen samples, for each step."""
    return [round(value, 4) for value in values[chosen].mean(dim=0).tolist()]


def _correlation(maps: Tensor, mask: Tensor) -> Tensor:
    """Correlation of each map with the mask of the objects, ``[N, Steps]``; 0 where either is constant."""
    left, right = maps - maps.mean(dim=2, keepdim=True), mask - mask.mean(dim=2, keepdim=True)
    return (left * right).sum(dim=2) / (left.norm(dim=2) * right.norm(dim=2)).clamp(min=1e-12)


def text(unit: Mapping[str, Any]) -> str:
    """The table of a unit."""
    batches, key = unit["batches"], unit["key"]
    mean = {name: statistics.mean(b[name] for b in batches) for name in ("reward", "missing")}
    samples = len(batches) * key["groups"] * key["group_size"]
    lines = [
        "",
        f"{key['name']}: {samples} of {key['batches'] * samples // len(batches)} samples, reward {mean['reward']:.3f}, "
        f"an object is missing in {mean['missing']:.0%}, {unit['seconds']:.0f} s",
    ]
    for part in (WHOLE, FIRST):
        heads = ("all samples", "found", "missing", "minus map")
        lines.append(f"  {'efficiency, ' + part:<32}" + "".join(f"{head:>16}" for head in heads))
        for name in names(unit):
            values = [efficiency(unit, name, kinds, part) for kinds in (CLASSES, ["found"], ["missing"])]
            values.append(gain(unit, name, "map", part))
            lines.append(f"  {name:<32}" + "".join(f"{value!s:>16}" for value in values))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
