"""Does allocating the advantage help? python -m studies.learning

Trains the small model from the same start under plain Flow-GRPO, under STAR and under its controls, over several seeds,
as the committed design says (studies/designs/main.yaml: tasks, arms, seeds, settings, analysis). Every run is one of
star-train, with equal samples; what differs is the weights of the loss.

Runs are resumed where they stopped, so that the study can be made in pieces (--minutes) and by several processes
(--worker 0/2, --worker 1/2). Afterwards, or with --report alone, all finished runs are collected into a JSON file with
a table and a picture.
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
CONTROLS = ("shuffled", "object mask", "means of one")  # weights that the driver has no setting for
EARLY = 0.7  # the goal: plain Flow-GRPO's final reward with this share of its samples


@dataclass(frozen=True)
class Unit:
    """One run of the study."""

    task: str
    arm: str
    seed: int

    def folder(self, root: Path) -> Path:
        return root / self.task / self.arm.replace(" ", "-") / str(self.seed)


class StudyTrainer(Trainer):
    """star-train's loop with a control's weights, up to a point in time.

    Args:
        control: of CONTROLS, or None for the weights of the settings.
        deadline: of time.monotonic, after which no epoch begins.
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
        if self.control == "means of one":  # of a split advantage's parts; what is no phrase's on all pixels alike
            for step in steps:
                step.weights[:, 0] = 1.0
                step.weights[:, 1:] /= step.weights[:, 1:].mean(dim=(-2, -1), keepdim=True)
            return batch
        side = steps[0].sample.shape[-1] // 2
        if self.control == "shuffled":
            found = torch.stack([step.weights.flatten(-2) for step in steps], dim=1)  # [N, Steps, (G,) P]
            moved = allocations.shuffled(found.flatten(1, -2), torch.Generator().manual_seed(self.epoch))
            weights = moved.view_as(found)
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
    print(f"{left} runs are left" if left else "all runs are done")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--design", type=Path, default=DESIGNS / "main.yaml")
    parser.add_argument("--arms", type=allocations.listed, help="only these, separated by semicolons")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no epoch begins after so many")
    parser.add_argument("--worker", type=_share, default=(0, 1), help="0/2 and 1/2: two processes share the runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "learning.json")
    parser.add_argument("--report", action="store_true", help="train nothing: collect, print and draw what is there")
    return parser.parse_args(arguments)


def units(design: dict[str, Any]) -> Iterator[Unit]:
    """Seed by seed, so that a study that is cut short has whole seeds."""
    for task in design["tasks"]:
        for seed in design["seeds"]:
            for arm in design["arms"]:
                yield Unit(task, arm, seed)


def train(unit: Unit, design: dict[str, Any], runs: Path, deadline: float) -> None:
    """Goes on with a run until it is done or the time is up."""
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
        "output.tensorboard": False,
        "output.images_every": 0,
        "output.checkpoint_every": epochs,
        "output.keep": 1,
    }
    config = parse_settings([f"--{name}={value}" for name, value in values.items()])
    print(f"{unit.task}, {unit.arm}, seed {unit.seed}", flush=True)
    StudyTrainer(config, arm.get("control"), deadline).run()


def curves(folder: Path) -> tuple[list[float], list[list[float]]]:
    """The rewards of a run's rollouts by epoch, and ``[epoch, reward]`` of its evaluations."""
    lines = read_metrics(folder)
    rollouts = [line["reward"] for line in lines if line["event"] == "epoch"]
    return rollouts, [[line["epoch"], line["reward"]] for line in lines if line["event"] == "evaluation"]


def finished(rollouts: list[float], evaluations: list[list[float]], epochs: int) -> bool:
    return len(rollouts) == epochs and bool(evaluations) and evaluations[-1][0] == epochs


def collect(design: dict[str, Any], runs: Path) -> dict[str, Any]:
    """The rewards of every finished run: of rollouts by epoch, and of evaluations."""
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
    """Final rewards, differences from plain Flow-GRPO paired by seed, and bounds of samples to plain's final reward."""
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
            mean, reach, _ = paired([run["evaluations"][-1][1] for run in runs.values()])
            line = f"  {arm:<22}{len(runs):>9}{start:>9.4f}{mean:>9.4f}{reach:>9.4f}"
            if arm != "plain" and pairs:
                difference, reach, p = paired(pairs)
                line += f"{difference:>9.4f}{reach:>9.4f}{p:>9.3f}"
                if len(next(iter(runs.values()))["evaluations"]) > 2:  # a curve, not its two ends
                    line += f"{_bounds(*samples_to(arms['plain'], runs)):>10}"
                    difference, reach, p = paired(early(arms["plain"], runs))
                    line += f"{difference:>9.4f}{reach:>9.4f}{p:>9.3f}"
            lines.append(line)
    lines += [
        "",
        "- plain: difference from plain Flow-GRPO with the same seed. Where there is a curve: samples, the shares of",
        "plain's samples (two evaluations, one after the other) between which the mean reaches plain's last one;",
        f"early, the last reward within {EARLY:g} x plain's samples minus plain's final one.",
    ]
    return "\n".join(lines)


def differences(plain: dict[int, dict[str, Any]], runs: dict[int, dict[str, Any]]) -> list[float]:
    """The last rewards, less plain's with the same seed."""
    return [runs[s]["evaluations"][-1][1] - plain[s]["evaluations"][-1][1] for s in runs if s in plain]


def paired(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, half of its 95 % interval, and the p-value of mean zero (Student's t); unknown for a single value."""
    from scipy.stats import t

    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    degrees = len(values) - 1
    p = 2 * float(t.sf(abs(mean) / error, degrees)) if error > 0 else math.nan
    return mean, float(t.ppf(0.975, degrees)) * error, p


def mean_curve(runs: dict[int, dict[str, Any]]) -> list[tuple[float, float]]:
    """Epoch and mean reward of the evaluations."""
    curves = [run["evaluations"] for run in runs.values()]
    return [(points[0][0], statistics.mean(p[1] for p in points)) for points in zip(*curves, strict=True)]


def samples_to(plain: dict[int, dict[str, Any]], runs: dict[int, dict[str, Any]]) -> tuple[float, float]:
    """Between which shares of plain's samples the mean curve reaches plain's last value: those of two evaluations.

    The curve in between is not known. A curve that never gets there has infinity for the second.
    """
    common = sorted(set(plain) & set(runs))
    reference = mean_curve({s: plain[s] for s in common})
    (last, goal), before = reference[-1], 0.0
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
    """By seed, the last reward within EARLY of plain's samples, less plain's final reward."""
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
            means, reaches = zip(*((m, r) for m, r, _ in map(paired, columns)), strict=True)
            axis.plot(epochs, means, color=color, label=f"{arm} ({len(runs)})", linewidth=1.6)
            if len(runs) > 2:  # of two, the interval says nothing
                low, high = ([m + sign * r for m, r in zip(means, reaches, strict=True)] for sign in (-1, 1))
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
        raise argparse.ArgumentTypeError(f"must look like 0/2, got {text!r}") from None
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"must count from 0 to below the processes, got {text!r}")
    return index, count


if __name__ == "__main__":
    sys.exit(main())
