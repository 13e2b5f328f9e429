"""Which allocation makes the gradient of the policy less noisy: python -m studies.agreement

Draws independent batches of samples at a fixed policy, computes the gradient of each batch under every allocation from
the same samples and rewards, and reports the mean cosine between the gradients of different batches. While the noise is
much larger than the signal the cosine grows in proportion to the batch, so the ratio of two allocations' cosines says
how many times the samples one is worth, relative to the other ("effective-sample multiple"). Intervals are jackknife
over batches. Four cosines are reported: of the gradients; of the gradients with each entry divided by the root mean
square that it has under scalar advantages, as Adam steps by them ("scaled"); and of scaled gradients with those of
scalar advantages in other batches ("along scalar"), which a field that only sharpens another objective does not raise;
and of what Adam would step, each entry over its own root mean square, with those as they are ("step").

One run measures one model; give checkpoints of star-train to measure along training. Results are appended to a JSON
file; allocations that it has already, of the same model and batches, are not measured again, and others join them.
--report prints and draws what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
from star_trainer.scenes import check
from star_trainer.schedule import schedule_of
from studies import allocations

RESULTS = Path(__file__).parent / "results"
STEPWISE = ("scalar", "core")  # whose gradients are kept for each denoising step, too


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    found = json.loads(options.out.read_text()) if options.out.exists() else {"units": []}
    if not options.report:
        config = settings(options)
        key = unit_key(options, config)
        policy = Policy(config, torch.device("cpu"))
        known = list(allocations.names(len(policy.model.transformer_blocks)))
        allocations.check_arms(options.arms or known, known)
        there = _unit(found, key)
        arms = [name for name in options.arms or known if there is None or name not in there["agreement"]]
        if arms:
            measured = measure(policy, config, options, arms)
            key["batches"] = measured.pop("batches")  # fewer where the time was up
            about = {"key": key, "label": options.label or key["model"]}
            add(found, {**about, **measured, "environment": environment.describe(torch.device("cpu"))})
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found) + "\n")
    for unit in found["units"]:
        print(text(unit))
    draw(found["units"]).savefig(options.out.with_suffix(".png"), dpi=110)
    print(f"wrote {options.out} and .png")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help='"small", or the folder of a pipeline')
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of star-train whose averaged weights are taken")
    parser.add_argument("--label", help="name of the model in tables and pictures")
    parser.add_argument("--task", choices=("composition", "text"), default="composition")
    parser.add_argument("--size", choices=("small", "large"), help="only prompts that ask for things of this size")
    parser.add_argument("--batches", type=int, default=32, help="independent batches")
    parser.add_argument("--groups", type=int, default=12, help="prompts of a batch")
    parser.add_argument("--group-size", type=int, default=8, help="samples of a prompt")
    parser.add_argument("--window-end", type=int, help="rollout.window_end, where it is not the preset's")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument(
        "--arms", type=allocations.listed, help="only these allocations, separated by semicolons; scalar always"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="no batch begins after so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "gradient-agreement.json")
    parser.add_argument("--report", action="store_true", help="measure nothing: print and draw what is there")
    options = parser.parse_args(arguments)
    if options.batches < 4:
        parser.error(f"--batches must be at least 4 for an interval, got {options.batches}")
    return options


def settings(options: argparse.Namespace) -> Config:
    """The preset of the small model, with the sizes of the measurement."""
    window = [] if options.window_end is None else ["--rollout.window_end", str(options.window_end)]
    made = parse_settings(["--preset", "small", "--model.path", options.model, *window])
    return replace(
        made,
        data=replace(made.data, prompts=f"scenes:{options.task}"),
        rollout=replace(made.rollout, groups=options.groups, group_size=options.group_size),
        train=replace(made.train, seed=options.seed, ratio_norm=False),
    )


def unit_key(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """What a unit depends on."""
    rollout = config.rollout
    return {
        "model": Path(options.model).name,
        "checkpoint": "/".join(options.checkpoint.parts[-2:]) if options.checkpoint else None,
        "task": options.task,
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
    """Takes up a unit; further allocations of one that is there, which has the same batches, join it."""
    there = _unit(found, unit["key"])
    if there is None:
        found["units"].append(unit)
        return
    there["agreement"] |= {name: arm for name, arm in unit["agreement"].items() if name not in there["agreement"]}
    there["seconds"] = round(there["seconds"] + unit["seconds"], 1)


def measure(policy: Policy, config: Config, options: argparse.Namespace, arms: Sequence[str]) -> dict[str, Any]:
    """Rewards, and of scalar advantages and these allocations the figures of :func:`agreement`."""
    if options.checkpoint:
        policy.model.load_state_dict(load_file(options.checkpoint / "average.safetensors"), strict=False)
    prompts = [p for p in load_prompts(config.data.prompts, seed="gradient agreement") if _asks_for(p, options.size)]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    blocks, preset_blocks = len(policy.model.transformer_blocks), config.allocation.blocks
    if not isinstance(preset_blocks, list):
        preset_blocks = list(range(blocks))
    if max(preset_blocks) >= blocks:
        raise SystemExit(f"--model must have the blocks {preset_blocks} of the preset 'small', got {blocks} blocks")
    wanted = {"scalar", *arms, *(("core",) if any(name.startswith("strength") for name in arms) else ())}
    autocast = Accelerator(cpu=True).autocast
    stored: dict[str, dict[int, Tensor]] = {}
    rewards, started = [], time.perf_counter()
    for number in tqdm(range(options.batches), desc=f"gradients, {options.label or options.model}", mininterval=5):
        if len(rewards) >= 4 and time.perf_counter() - started > 60 * options.minutes:
            break
        drawn = choose(prompts, config.rollout.groups, number, config.train.seed)
        rolled = allocations.roll_out(policy, drawn, config, number, autocast)
        verdicts = check(rolled.batch.images, [p.metadata for p in rolled.batch.prompts])
        rewards.append(verdicts.graded.mean().item())
        fields = allocations.fields(rolled, credit(verdicts.graded, verdicts.phrases, config), number, preset_blocks)
        fields = {name: terms for name, terms in fields.items() if name in wanted}
        found = gradients(policy, rolled.batch, fields, parameters, config)
        for name, gradient in {**found, **{name: own for name, own in _mixed(found).items() if name in wanted}}.items():
            stored.setdefault(name, {})[number] = gradient.bfloat16()  # its rounding is far below the noise measured
    return {
        "reward": sum(rewards) / len(rewards),
        "batches": len(rewards),
        "parameters": sum(p.numel() for p in parameters),
        "seconds": round(time.perf_counter() - started, 1),
        "agreement": compared(stored),
    }


def credit(graded: Tensor, phrases: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages of samples ``[N]``, by the reward of each phrase alone of phrases ``[N, G]``, and phrases' parts of
    the samples' ``[N, G]``; NaN becomes 0."""
    size = config.rollout.group_size
    split = split_advantages(graded, phrases, size).values
    own = phrase_advantages(phrases, size).values
    limit = config.train.advantage_clip
    whole, parts = split[:, 0], split[:, 1:]
    return whole.clamp(-limit, limit), own.clamp(-limit, limit), parts.clamp(-limit, limit)


def gradients(
    policy: Policy, batch: Batch, fields: allocations.Fields, parameters: Sequence[Tensor], config: Config
) -> dict[str, Tensor]:
    """The flattened gradient of the batch under each allocation, one forward pass a step for all of them."""
    schedule = schedule_of(policy.pipeline, config.rollout.steps)
    total: dict[str, Tensor] = {}
    for at, step in enumerate(batch.steps):
        velocity = policy.velocity(step.sample, schedule.timestep(step.number), batch.text)
        transition = schedule.transition(step.number, config, len(batch.numbers), policy.device)
        for i, (name, terms) in enumerate(fields.items()):
            slope = torch.zeros_like(velocity)
            for advantages, weights in terms:
                slope += _slope(velocity, step, transition, advantages, weights[:, at])
            last = i == len(fields) - 1
            found = torch.autograd.grad(velocity, parameters, slope, retain_graph=not last, allow_unused=True)
            flat = torch.cat([_flat(g, p) for g, p in zip(found, parameters, strict=True)])
            total[name] = total[name] + flat if name in total else flat
            if name in STEPWISE:
                total[f"{name}, step {step.number}"] = flat
    return total


def _slope(velocity: Tensor, step: Step, transition: Any, advantages: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the policy loss with respect to the velocity; the policy is the one that drew the samples."""
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


def compared(stored: dict[str, dict[int, Tensor]]) -> dict[str, dict[str, Any]]:
    """Of each allocation, from its gradients by batch, the cosines, see above."""
    scalar = stored["scalar"]
    scale = adam_scale(scalar.values())
    found = {}
    for name, vectors in stored.items():
        if len(vectors) < 4:  # a step that few batches trained
            continue
        stacked = torch.stack(list(vectors.values()))
        found[name] = agreement(stacked)
        found[name]["scaled"] = agreement(stacked, scale=scale)
        others = torch.stack([scalar[n] for n in vectors])
        found[name]["along scalar"] = agreement(stacked, others, scale=scale)
        found[name]["step"] = agreement(stacked, others, scale=adam_scale(stacked), scale_others=False)
    return found


def adam_scale(vectors: Iterable[Tensor]) -> Tensor:
    """One over the root mean square of each entry over vectors ``[D]``."""
    squares, count = torch.zeros(()), 0
    for vector in vectors:
        squares, count = squares + vector.float().square(), count + 1
    return (squares / count).sqrt().clamp(min=1e-12).reciprocal()


def cosines(arm: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those that a unit has of an allocation, by kind; "" is that of the gradients as they are."""
    return {"": arm, **{kind: arm[kind] for kind in ("scaled", "along scalar", "step") if kind in arm}}


def agreement(
    vectors: Tensor,
    others: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    scale_others: bool = True,
) -> dict[str, Any]:
    """Mean cosine between vectors and others of another row, its jackknife error, and the means without each row.

    Args:
        vectors: ``[N, D]``.
        others: ``[N, D]``; None: the vectors.
        scale: ``[D]``, a factor of every entry.
        scale_others: whether of others, too.
    """
    n, size = vectors.shape
    inner, squares = torch.zeros(n, n), torch.zeros(2, n)
    for start in range(0, size, 1 << 18):
        chosen = slice(start, start + (1 << 18))
        factor = 1.0 if scale is None else scale[chosen]
        left = vectors[:, chosen].float() * factor
        right = left if others is None else others[:, chosen].float() * (factor if scale_others else 1.0)
        inner += left @ right.T
        squares += torch.stack([left.square().sum(dim=1), right.square().sum(dim=1)])
    norms = squares.sqrt()
    cosines = (inner / (norms[0, :, None] * norms[1])).fill_diagonal_(0)
    total = cosines.sum().item()
    own = cosines.sum(dim=0) + cosines.sum(dim=1)
    without = [(total - o) / ((n - 1) * (n - 2)) for o in own.tolist()]
    return {"cosine": total / (n * (n - 1)), "error": jackknife(without), "without": [round(w, 7) for w in without]}


def jackknife(without: Sequence[float]) -> float:
    """Standard error from the estimates that leave one of n observations out."""
    n, mean = len(without), sum(without) / len(without)
    return math.sqrt((n - 1) / n * sum((w - mean) ** 2 for w in without))


@dataclass(frozen=True)
class Multiple:
    """How many times the samples of scalar advantages an allocation is worth, with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.value)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def multiple(arm: dict[str, Any], reference: dict[str, Any]) -> Multiple:
    """Ratio of ``c / (1 - c)``, which is proportional to the samples; unknown where a cosine is not positive."""

    def odds(c: float) -> float:
        return c / (1 - c)

    if arm["cosine"] <= 0 or reference["cosine"] <= 0:
        return Multiple(math.nan, math.nan, math.nan)
    value = odds(arm["cosine"]) / odds(reference["cosine"])
    error = jackknife([odds(a) / odds(r) for a, r in zip(arm["without"], reference["without"], strict=True)])
    return Multiple(value, value - 1.96 * error, value + 1.96 * error)


def text(unit: dict[str, Any]) -> str:
    key, reference = unit["key"], unit["agreement"]["scalar"]
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
            other = cosines(reference)[kind]
            error = jackknife([a - r for a, r in zip(own["without"], other["without"], strict=True)])
            times = multiple(own, other)
            lines[-1] += f"{own['cosine'] - other['cosine']:>12.4f}{1.96 * error:>13.4f}"
            lines[-1] += f"{times!s:>22}" if times.known else ""
    return "\n".join(lines)


def shown(unit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The allocations of tables and pictures, controls last."""
    names = [name for name in unit["agreement"] if ", step" not in name]
    return {name: unit["agreement"][name] for name in sorted(names, key=lambda name: name in allocations.CONTROLS)}


def draw(units: Sequence[dict[str, Any]]) -> Any:
    """A panel for each unit: the cosine of each allocation, and of scalar and core by step."""
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
    """Weights of a strength below one are a mixture of ones and the map, and so is their gradient."""
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
