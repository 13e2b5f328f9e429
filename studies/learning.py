"""Measures learning curves with and without an allocation of the advantage: python -m studies.learning

The study trains the small model with plain Flow-GRPO, with STAR and with its controls, over several seeds, from the
same initial weights. The design is a committed file with tasks, arms, seeds, settings and analysis, such as
studies/designs/main.yaml. Every run is a run of star-train with the same number of samples; the arms differ in the
weights of the loss.

An interrupted run is resumed, so that the study can be run in pieces (--minutes) and by several processes
(--worker 0/2, --worker 1/2). At the end, or with --report, all finished runs are collected into a JSON file with a
table and a plot.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from benchmarks.reporting import environment
from star_kernels import allocate
from star_trainer.command import parse as parse_settings
from star_trainer.config import Config
from star_trainer.prompts import Prompt
from star_trainer.record import read_metrics
from star_trainer.samples import Batch
from star_trainer.trainer import Trainer
from studies import allocations

DESIGNS = Path(__file__).parent / "designs"
RESULTS = Path(__file__).parent / "results"
CONTROLS = ("shuffled", "inverted", "object mask", "means of one")  # weights that are no setting of star-train
EARLY = 0.7  # the goal is the final reward of plain Flow-GRPO with this share of its samples


@dataclass(frozen=True)
class Unit:
    """One run of the study."""

    task: str
    arm: str
    seed: int

    def folder(self, root: Path) -> Path:
        return root / self.task / self.arm.replace(" ", "-") / str(self.seed)


class StudyTrainer(Trainer):
    """The trainer of star-train with the weights of a control and a deadline.

    Args:
        control: a name in CONTROLS, or None for the weights of the settings.
        deadline: time of ``time.monotonic`` after which no epoch is started.
    """

    def __init__(self, config: Config, control: str | None, deadline: float) -> None:
        super().__init__(config, Accelerator(cpu=not torch.cuda.is_available()), progress=False)
        self.control, self.deadline = control, deadline

    def train_epoch(self) -> dict[str, float]:
        found = super().train_epoch()
        self.stopped = self.stopped or time.monotonic() > self.deadline
        return found

    def roll_out(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> Batch:
        batch = super().roll_out(prompts, numbers)
        if self.control is None:
            return batch
        steps = batch.steps
        if self.control == "means of one":  # of each part of a split advantage; the remainder has uniform weights
            for step in steps:
                step.weights[:, 0] = 1.0
                step.weights[:, 1:] /= step.weights[:, 1:].mean(dim=(-2, -1), keepdim=True)
            return batch
        side = steps[0].sample.shape[-1] // 2
        if self.control == "inverted":
            for step in steps:
                step.weights[:] = allocate(step.weights.amax(dim=(1, 2), keepdim=True) - step.weights, layout="bhw")
            return batch
        if self.control == "shuffled":
            original = torch.stack([step.weights.flatten(-2) for step in steps], dim=1)  # [N, Steps, (G,) P]
            moved = allocations.shuffled(original.flatten(1, -2), torch.Generator().manual_seed(self.epoch))
            weights = moved.view_as(original)
        else:
            mask = allocate(allocations.object_mask(batch)).to(steps[0].sample.device)
            weights = mask[:, None].expand(-1, len(steps), -1)
        on_grid = weights.unflatten(-1, (side, side))
        return replace(batch, steps=[replace(s, weights=on_grid[:, i].contiguous()) for i, s in enumerate(steps)])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    design = yaml.safe_load(options.design.read_text())
    arms = options.arms or list(design["arms"])
    allocations.check_arms(arms, list(design["arms"]))
    deadline = time.monotonic() + 60 * options.minutes
    if not options.report:
        chosen = [unit for unit in units(design) if unit.arm in arms]
        for unit in chosen[options.worker[0] :: options.worker[1]]:
            if time.monotonic() > deadline:
                break
            train(unit, design, options.runs, deadline)
    result = collect(design, options.runs)
    if result["runs"] and options.worker[1] == 1:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result) + "\n")
        print(text(result))
        draw(result).savefig(options.out.with_suffix(".png"), dpi=110)
        print(f"wrote {options.out} and .png")
    left = sum(1 for _ in units(design)) - len(result["runs"])
    print(f"{left} runs are not finished" if left else "all runs are finished")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--design", type=Path, default=DESIGNS / "main.yaml", help="YAML file of the design")
    parser.add_argument("--arms", type=allocations.split_names, help="run only these arms, separated by semicolons")
    parser.add_argument("--minutes", type=float, default=math.inf, help="minutes after which no epoch is started")
    parser.add_argument(
        "--worker", type=_share, default=(0, 1), help="divide the runs among processes, such as 0/2, 1/2"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "learning.json", help="JSON file of the results")
    parser.add_argument("--report", action="store_true", help="only collect, print and plot the finished runs")
    return parser.parse_args(arguments)


def units(design: dict[str, Any]) -> Iterator[Unit]:
    """All runs, seed by seed, so that a study that stops early has complete seeds."""
    for task in design["tasks"]:
        for seed in design["seeds"]:
            for arm in design["arms"]:
                yield Unit(task, arm, seed)


def train(unit: Unit, design: dict[str, Any], runs: Path, deadline: float) -> None:
    """Starts or resumes a run until it is finished or the deadline has passed."""
    folder, arm = unit.folder(runs), design["arms"][unit.arm]
    epochs = design["settings"]["train.epochs"]
    if finished(*curves(folder), epochs):
        return
    values = {
        **design["settings"],
        **{name: value for name, value in arm.items() if name != "control"},
        "data.prompts": f"scenes:{unit.task}",
        "train.seed": unit.seed,
        "output.folder": str(folder),
        "output.resume": True,
        "output.trackers": [],
        "output.images_every": 0,
        "output.checkpoint_every": epochs,
        "output.keep": 1,
    }
    config = parse_settings([f"--{name}={value}" for name, value in values.items()])
    print(f"task {unit.task}, arm {unit.arm}, seed {unit.seed}", flush=True)
    StudyTrainer(config, arm.get("control"), deadline).run()


def curves(folder: Path) -> tuple[list[float], list[list[float]]]:
    """The rewards of a run's rollouts by epoch, and ``[epoch, reward]`` of each evaluation."""
    lines = read_metrics(folder)
    rollouts = [line["reward"] for line in lines if line["event"] == "epoch"]
    return rollouts, [[line["epoch"], line["reward"]] for line in lines if line["event"] == "evaluation"]


def finished(rollouts: list[float], evaluations: list[list[float]], epochs: int) -> bool:
    return len(rollouts) == epochs and bool(evaluations) and evaluations[-1][0] == epochs


def collect(design: dict[str, Any], runs: Path) -> dict[str, Any]:
    """Collects the rewards of every finished run: those of the rollouts by epoch, and those of the evaluations."""
    found = []
    for unit in units(design):
        folder = unit.folder(runs)
        rollouts, evaluations = curves(folder)
        if finished(rollouts, evaluations, design["settings"]["train.epochs"]):
            lines = read_metrics(folder)
            seconds = sum(value for line in lines for name, value in line.items() if name.startswith("seconds/"))
            found.append(
                {**asdict(unit), "rollouts": rollouts, "evaluations": evaluations, "seconds": round(seconds, 1)}
            )
    return {
        "environment": environment.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "design": design,
        "runs": found,
    }


def text(result: dict[str, Any]) -> str:
    """The table of a study: final rewards, and their differences from plain Flow-GRPO paired by seed."""
    lines = []
    for task in result["design"]["tasks"]:
        arms = by_arm(result, task)
        if "plain" not in arms:
            continue
        lines += ["", f"{task}: reward of {result['design']['settings']['evaluation.prompts']} held-out prompts"]
        head = ("seeds", "start", "final", "± 95 %", "- plain", "± 95 %", "p", "   samples", "early", "± 95 %", "p")
        lines.append(f"  {'arm':<22}" + "".join(f"{word:>9}" for word in head))
        for arm, runs in arms.items():
            pairs = differences(arms["plain"], runs)
            start = statistics.mean(run["evaluations"][0][1] for run in runs.values())
            mean, half_width, _ = paired([run["evaluations"][-1][1] for run in runs.values()])
            line = f"  {arm:<22}{len(runs):>9}{start:>9.4f}{mean:>9.4f}{half_width:>9.4f}"
            if arm != "plain" and pairs:
                difference, half_width, p = paired(pairs)
                line += f"{difference:>9.4f}{half_width:>9.4f}{p:>9.3f}"
                if len(next(iter(runs.values()))["evaluations"]) > 2:  # more than the two ends of the curve
                    line += f"{_bounds(*samples_to(arms['plain'], runs)):>10}"
                    difference, half_width, p = paired(early(arms["plain"], runs))
                    line += f"{difference:>9.4f}{half_width:>9.4f}{p:>9.3f}"
            lines.append(line)
    lines += [
        "",
        '"- plain" is the difference from plain Flow-GRPO with the same seed. If a run has more than two evaluations,',
        '"samples" is the interval between two successive evaluations in which the mean reward reaches the final',
        'reward of plain Flow-GRPO, as a fraction of its samples, and "early" is the last reward within',
        f"{EARLY:g} of these samples minus that final reward.",
    ]
    return "\n".join(lines)


def differences(plain: dict[int, dict[str, Any]], runs: dict[int, dict[str, Any]]) -> list[float]:
    """The final rewards minus those of plain Flow-GRPO with the same seed."""
    return [runs[s]["evaluations"][-1][1] - plain[s]["evaluations"][-1][1] for s in runs if s in plain]


def paired(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, half-width of its 95 % interval, and p-value of a zero mean (Student's t). NaN for a single value."""
    from scipy.stats import t

    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    degrees = len(values) - 1
    p = 2 * float(t.sf(abs(mean) / error, degrees)) if error > 0 else math.nan
    return mean, float(t.ppf(0.975, degrees)) * error, p


def mean_curve(runs: dict[int, dict[str, Any]]) -> list[tuple[float, float]]:
    """Epoch and mean reward over runs of each evaluation."""
    curves = [run["evaluations"] for run in runs.values()]
    return [(points[0][0], statistics.mean(p[1] for p in points)) for points in zip(*curves, strict=True)]


def samples_to(plain: dict[int, dict[str, Any]], runs: dict[int, dict[str, Any]]) -> tuple[float, float]:
    """The interval in which the mean curve reaches the final reward of plain Flow-GRPO, in shares of its samples.

    The ends of the interval are two successive evaluations. The second is infinity if the curve does not reach it.
    """
    common = sorted(set(plain) & set(runs))
    (last, goal), before = mean_curve({s: plain[s] for s in common})[-1], 0.0
    for epoch, reward in mean_curve({s: runs[s] for s in common}):
        if reward >= goal:
            return before / last, epoch / last
        before = epoch
    return before / last, math.inf


def _bounds(low: float, high: float) -> str:
    if math.isinf(high):
        return f"> {low:.3g}"
    return f"{low:.3g} to {high:.3g}" if low > 0 else f"<= {high:.3g}"


def early(plain: dict[int, dict[str, Any]], runs: dict[int, dict[str, Any]]) -> list[float]:
    """By seed, the last reward within EARLY of plain's samples minus the final reward of plain Flow-GRPO."""
    found = []
    for seed in sorted(set(plain) & set(runs)):
        last, goal = plain[seed]["evaluations"][-1]
        found.append([reward for epoch, reward in runs[seed]["evaluations"] if epoch <= EARLY * last][-1] - goal)
    return found


def draw(result: dict[str, Any]) -> Any:
    """Mean curves of the evaluations with 95 % intervals over seeds, a panel for each task."""
    from matplotlib.figure import Figure

    tasks = [task for task in result["design"]["tasks"] if by_arm(result, task)]
    figure = Figure(figsize=(6.4 * len(tasks), 4.2), layout="constrained")
    colors = ["#7F7F7F", "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#000000"]
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for (arm, runs), color in zip(by_arm(result, task).items(), colors, strict=False):
            epochs = [point[0] for point in next(iter(runs.values()))["evaluations"]]
            columns = list(zip(*([p[1] for p in run["evaluations"]] for run in runs.values()), strict=True))
            means, half_widths = zip(*((m, r) for m, r, _ in map(paired, columns)), strict=True)
            axis.plot(epochs, means, color=color, label=f"{arm} ({len(runs)})", linewidth=1.6)
            if len(runs) > 2:  # the interval of two runs is too wide to be useful
                low, high = ([m + sign * r for m, r in zip(means, half_widths, strict=True)] for sign in (-1, 1))
                axis.fill_between(epochs, low, high, color=color, alpha=0.12, linewidth=0)
        axis.set(xlabel="epoch", ylabel="reward of held-out prompts", title=task)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    return figure


def by_arm(result: dict[str, Any], task: str) -> dict[str, dict[int, dict[str, Any]]]:
    """The runs of each arm, by seed."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for run in result["runs"]:
        if run["task"] == task:
            arms.setdefault(run["arm"], {})[run["seed"]] = run
    return arms


def _share(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be INDEX/COUNT, such as 0/2, got {text!r}") from None
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"must be INDEX/COUNT with 0 <= INDEX < COUNT, got {text!r}")
    return index, count


if __name__ == "__main__":
    sys.exit(main())
