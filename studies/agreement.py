"""Measures which allocation reduces the noise of the policy gradient: python -m studies.agreement

The study draws independent batches of samples from a fixed policy, computes the gradient of each batch under every
allocation from the same samples and rewards, and reports the mean cosine between the gradients of different batches. As
long as the noise is much larger than the signal, the cosine is proportional to the batch size, so the ratio of the
cosines of two allocations is the factor by which one of them saves samples (the "effective-sample multiple"). The
intervals are jackknife intervals over the batches.

Four cosines are reported:
  (unnamed)     the cosine of the gradients
  scaled        the cosine of the gradients after each entry is divided by its root mean square under scalar advantages,
                as Adam scales it
  along scalar  the cosine of scaled gradients with the scaled gradients of scalar advantages in other batches; an
                allocation that only sharpens another objective does not increase it
  step          the cosine of the gradients, each entry divided by its own root mean square as in a step of Adam, with
                the unscaled gradients of scalar advantages in other batches

A run measures one model; use --checkpoint to measure a model during training. Results are added to a JSON file.
Allocations that the file already has for the same model and batches are not measured again. --report prints and plots
the results in the file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.reporting import environment
from star_kernels import weighted_policy_loss
from star_trainer.command import parse as parse_settings
from star_trainer.config import Config
from star_trainer.credit import phrase_advantages, split_advantages
from star_trainer.policy import Policy
from star_trainer.prompts import Prompt, choose, load_prompts
from star_trainer.samples import Batch, Step
from star_trainer.scenes import RULES, check
from studies import allocations
from studies.cosines import compared, cosines, jackknife, multiple

RESULTS = Path(__file__).parent / "results"
STEPWISE = ("scalar", "core")  # allocations whose gradients are also compared for each denoising step


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    found = json.loads(options.out.read_text()) if options.out.exists() else {"units": []}
    if not options.report:
        config = settings(options)
        key = unit_key(options, config)
        policy = Policy(config, torch.device("cpu"))
        known = list(allocations.names(len(policy.model.transformer_blocks)))
        allocations.check_arms(options.arms or known, known)
        existing = _unit(found, key)
        arms = [name for name in options.arms or known if existing is None or name not in existing["agreement"]]
        if arms:
            measured = measure(policy, config, options, arms)
            key["batches"] = measured.pop("batches")  # fewer than requested if the time ran out
            header = {"key": key, "label": options.label or key["model"]}
            add(found, {**header, **measured, "environment": environment.describe(torch.device("cpu"))})
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found) + "\n")
    for unit in found["units"]:
        print(text(unit))
    draw(found["units"]).savefig(options.out.with_suffix(".png"), dpi=110)
    print(f"wrote {options.out} and .png")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.agreement", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small", help='"small", or the folder of a pipeline')
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of star-train; its averaged weights are used")
    parser.add_argument("--label", help="name of the model in tables and plots")
    parser.add_argument("--task", choices=("composition", "text"), default="composition")
    parser.add_argument("--rule", choices=RULES, default="geneval", help="rule of the reward (default: geneval)")
    parser.add_argument("--size", choices=("small", "large"), help="use only prompts for objects of this size")
    parser.add_argument("--batches", type=int, default=32, help="number of independent batches (default: 32)")
    parser.add_argument("--groups", type=int, default=12, help="prompts per batch (default: 12)")
    parser.add_argument("--group-size", type=int, default=8, help="samples per prompt (default: 8)")
    parser.add_argument("--window-end", type=int, help="rollout.window_end (default: that of the preset)")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the samples (default: 1000)")
    parser.add_argument(
        "--arms",
        type=allocations.split_names,
        help="measure only these allocations, separated by semicolons, and scalar advantages",
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="minutes after which no batch is started")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "gradient-agreement.json", help="JSON file of the results"
    )
    parser.add_argument("--report", action="store_true", help="only print and plot the results in the JSON file")
    options = parser.parse_args(arguments)
    if options.batches < 4:
        parser.error(f"--batches must be at least 4, which an interval requires, got {options.batches}")
    return options


def settings(options: argparse.Namespace) -> Config:
    """The preset of the small model, with the batch size and the seed of the options."""
    window = [] if options.window_end is None else ["--rollout.window_end", str(options.window_end)]
    made = parse_settings(["--preset", "small", "--model.path", options.model, *window])
    return replace(
        made,
        data=replace(made.data, prompts=f"scenes:{options.task}"),
        rollout=replace(made.rollout, groups=options.groups, group_size=options.group_size),
        train=replace(made.train, seed=options.seed),
    )


def unit_key(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The settings that identify a unit of the results."""
    rollout = config.rollout
    return {
        "model": Path(options.model).name,
        "checkpoint": "/".join(options.checkpoint.parts[-2:]) if options.checkpoint else None,
        "task": options.task,
        "rule": options.rule,
        "size": options.size,
        "batches": options.batches,
        "samples": options.groups * options.group_size,
        "group_size": options.group_size,
        "seed": options.seed,
        "guidance": rollout.guidance,
        "steps": rollout.steps,
        "window": [rollout.window, rollout.window_end],
        "noise_level": rollout.noise_level,
        "transition": rollout.transition,
    }


def add(found: dict[str, Any], unit: dict[str, Any]) -> None:
    """Adds a unit to the results. If there is one with the same key, its missing allocations are added to it."""
    existing = _unit(found, unit["key"])
    if existing is None:
        found["units"].append(unit)
        return
    existing["agreement"] |= {n: arm for n, arm in unit["agreement"].items() if n not in existing["agreement"]}
    existing["seconds"] = round(existing["seconds"] + unit["seconds"], 1)


def measure(policy: Policy, config: Config, options: argparse.Namespace, arms: Sequence[str]) -> dict[str, Any]:
    """Measures the mean reward, and the cosines for scalar advantages and the given allocations."""
    if options.checkpoint:
        policy.model.load_state_dict(load_file(options.checkpoint / "average.safetensors"), strict=False)
    prompts = [p for p in load_prompts(config.data.prompts, seed="gradient agreement") if _asks_for(p, options.size)]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    blocks, preset_blocks = len(policy.model.transformer_blocks), config.allocation.blocks
    if not isinstance(preset_blocks, list):
        preset_blocks = list(range(blocks))
    if max(preset_blocks) >= blocks:
        raise SystemExit(f"--model must have blocks {preset_blocks} of the preset 'small', got {blocks} blocks")
    wanted = {"scalar", *arms, *(("core",) if any(name.startswith("strength") for name in arms) else ())}
    autocast = Accelerator(cpu=True).autocast
    stored: dict[str, dict[int, Tensor]] = {}
    rewards, started = [], time.perf_counter()
    for number in tqdm(range(options.batches), desc=f"gradients, {options.label or options.model}", mininterval=5):
        if len(rewards) >= 4 and time.perf_counter() - started > 60 * options.minutes:
            break
        drawn = choose(prompts, config.rollout.groups, number, config.train.seed)
        rolled = allocations.roll_out(policy, drawn, config, number, autocast)
        verdicts = check(rolled.batch.images, [p.metadata for p in rolled.batch.prompts], rule=options.rule)
        rewards.append(verdicts.graded.mean().item())
        fields = allocations.fields(rolled, credit(verdicts.graded, verdicts.phrases, config), number, preset_blocks)
        fields = {name: terms for name, terms in fields.items() if name in wanted}
        found = gradients(policy, rolled.batch, fields, parameters, config)
        for name, gradient in {**found, **{name: own for name, own in _mixed(found).items() if name in wanted}}.items():
            stored.setdefault(name, {})[number] = gradient.bfloat16()  # the rounding error is far below the noise
    return {
        "reward": sum(rewards) / len(rewards),
        "batches": len(rewards),
        "parameters": sum(p.numel() for p in parameters),
        "seconds": round(time.perf_counter() - started, 1),
        "agreement": compared(stored),
    }


def credit(graded: Tensor, phrases: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the advantages of samples and phrases. NaN becomes 0.

    Returns:
        The advantages of the samples ``[N]``, the advantages of the phrases by their own rewards ``[N, G]``, and the
        contributions of the phrases to the samples' advantages ``[N, G]``.
    """
    size = config.rollout.group_size
    split = split_advantages(graded, phrases, size).values
    own = phrase_advantages(phrases, size).values
    limit = config.train.advantage_clip
    whole, parts = split[:, 0], split[:, 1:]
    return whole.clamp(-limit, limit), own.clamp(-limit, limit), parts.clamp(-limit, limit)


def gradients(
    policy: Policy, batch: Batch, fields: allocations.Fields, parameters: Sequence[Tensor], config: Config
) -> dict[str, Tensor]:
    """The flattened gradient of the batch under each allocation, with one forward pass per step for all of them."""
    schedule = policy.schedule(config.rollout.steps)
    total: dict[str, Tensor] = {}
    for at, step in enumerate(batch.steps):
        velocity = policy.velocity(step.sample, schedule.timestep(step.number), batch.text)
        transition = schedule.transition(step.number, config, len(batch.numbers), policy.device)
        for i, (name, terms) in enumerate(fields.items()):
            slope = torch.zeros_like(velocity)
            for advantages, weights in terms:
                slope += slope_of(velocity, step, transition, advantages, weights[:, at])
            last = i == len(fields) - 1
            found = torch.autograd.grad(velocity, parameters, slope, retain_graph=not last, allow_unused=True)
            flat = torch.cat([_flat(g, p) for g, p in zip(found, parameters, strict=True)])
            total[name] = total[name] + flat if name in total else flat
            if name in STEPWISE:
                total[f"{name}, step {step.number}"] = flat
    return total


def slope_of(velocity: Tensor, step: Step, transition: Any, advantages: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the policy loss with respect to the velocity, on policy."""
    leaf = velocity.detach().requires_grad_()
    side = step.sample.shape[-1] // 2
    loss, _ = weighted_policy_loss(
        leaf,
        step.sample,
        step.prev_sample,
        step.log_prob,
        advantages,
        transition,
        weights=weights.unflatten(1, (side, side)).contiguous(),
        clip_range=0.2,
    )
    (slope,) = torch.autograd.grad(loss, leaf)
    return slope


def text(unit: dict[str, Any]) -> str:
    """The table of a unit."""
    key, baseline = unit["key"], unit["agreement"]["scalar"]
    lines = [
        "",
        f"{unit['label']} · {key['task']}{' · ' + key['size'] if key['size'] else ''} · {key['batches']} batches of "
        f"{key['samples']} samples · reward {unit['reward']:.3f} · {unit['seconds']:.0f} s",
        f"  {'allocation':<36}{'cosine':>9}{'± 1.96 s.e.':>13}{'difference':>12}{'± 1.96 s.e.':>13}{'multiple':>22}",
    ]
    for name, arm in unit["agreement"].items():
        for kind, own in cosines(arm).items():
            lines.append(
                f"  {', '.join(filter(None, (name, kind))):<36}{own['cosine']:>9.4f}{1.96 * own['error']:>13.4f}"
            )
            if ", step" in name:
                continue
            other = cosines(baseline)[kind]
            error = jackknife([a - r for a, r in zip(own["without"], other["without"], strict=True)])
            times = multiple(own, other)
            lines[-1] += f"{own['cosine'] - other['cosine']:>12.4f}{1.96 * error:>13.4f}"
            lines[-1] += f"{times!s:>22}" if times.known else ""
    return "\n".join(lines)


def shown(unit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The allocations in tables and plots, controls last."""
    names = [name for name in unit["agreement"] if ", step" not in name]
    return {name: unit["agreement"][name] for name in sorted(names, key=lambda name: name in allocations.CONTROLS)}


def draw(units: Sequence[dict[str, Any]]) -> Any:
    """Plots the cosine of each allocation, one panel for each unit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * min(2, len(units)), 5.6 * -(-len(units) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(units) // 2), min(2, len(units)), squeeze=False)
    for axis in axes.flat[len(units) :]:
        axis.axis("off")
    for axis, unit in zip(axes.flat, units, strict=False):
        arms = shown(unit)
        names = list(arms)[::-1]
        values = [arms[name]["cosine"] for name in names]
        errors = [1.96 * arms[name]["error"] for name in names]
        colors = [allocations.color(name) for name in names]
        axis.barh(range(len(names)), values, xerr=errors, color=colors, height=0.7, error_kw={"elinewidth": 0.8})
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.axvline(arms["scalar"]["cosine"], color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{unit['label']}, {unit['key']['task']}, reward {unit['reward']:.2f}", fontsize=9)
        axis.set_xlabel("mean cosine between gradients of independent batches", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _mixed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients for strengths below one, by interpolation: the gradient is linear in the weights."""
    if "core" not in found:
        return {}
    return {f"strength {s:g}": torch.lerp(found["scalar"], found["core"], s) for s in allocations.STRENGTHS}


def _unit(found: dict[str, Any], key: dict[str, Any]) -> dict[str, Any] | None:
    return next((unit for unit in found["units"] if unit["key"] == key), None)


def _asks_for(prompt: Prompt, size: str | None) -> bool:
    return size is None or any(entry.get("size") == size for entry in prompt.metadata.get("include", ()))


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).flatten()


if __name__ == "__main__":
    sys.exit(main())
