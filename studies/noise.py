"""Measures where learning is limited by the noise of the gradient: python -m studies.noise

Plain Flow-GRPO trains the small model with several numbers of samples for each update, and several learning rates for
each. The outcome is the number of samples until the reward of held-out prompts reaches a goal. Where that number does
not depend on the number of samples for an update, learning is limited by noise, and an allocation with less noise must
show. Where it grows in proportion, learning is limited by the number of updates, and less noise cannot help.

The design is a committed file. Runs are started in its order, so that a study that stops early has the most informative
ones, and end at the first evaluation that reaches the goal. An interrupted run is resumed (--minutes). Each run is
stored in the JSON file, and runs that have ended there are not repeated. --report only prints the results.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.reporting import environment
from star_trainer.command import parse as parse_settings
from star_trainer.config import Config
from studies.learning import DESIGNS, RESULTS, StudyTrainer, curves


@dataclass(frozen=True)
class Cell:
    """One run: the trained steps, the samples for an update, the learning rate and the seed."""

    steps: str
    samples: int
    rate: float
    seed: int

    def folder(self, root: Path) -> Path:
        return root / self.steps.replace(" ", "-") / f"{self.samples}-{self.rate:g}" / str(self.seed)


class NoiseTrainer(StudyTrainer):
    """Plain Flow-GRPO that ends at the first evaluation that reaches a goal."""

    def __init__(self, config: Config, goal: float, deadline: float) -> None:
        super().__init__(config, None, deadline)
        self.goal = goal

    def evaluate(self) -> dict[str, float]:
        found = super().evaluate()
        self.stopped = self.stopped or found["reward"] >= self.goal
        return found


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    design = yaml.safe_load(options.design.read_text())
    result = json.loads(options.out.read_text()) if options.out.exists() else {"design": design, "runs": []}
    result["design"] = design
    deadline = time.monotonic() + 60 * options.minutes
    if not options.report:
        for cell in cells(design):
            if time.monotonic() > deadline:
                break
            if not any(_is(run, cell) and ended(run, design) for run in result["runs"]):
                train(cell, design, options.runs, deadline)
                store(result, cell, options)
    print(text(result))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.noise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--design", type=Path, default=DESIGNS / "noise.yaml", help="YAML file of the design")
    parser.add_argument("--minutes", type=float, default=math.inf, help="minutes after which no epoch is started")
    parser.add_argument("--runs", type=Path, default=Path("runs/noise"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "noise.json", help="JSON file of the results")
    parser.add_argument("--report", action="store_true", help="only print the results in the JSON file")
    return parser.parse_args(arguments)


def cells(design: Mapping[str, Any]) -> Iterator[Cell]:
    """All runs, in the order in which they are started."""
    for seed in design["seeds"]:
        for steps, samples, rate in design["order"]:
            yield Cell(steps, samples, float(rate), seed)


def settings(cell: Cell, design: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run for star-train."""
    every, size = design["evaluate_every"], design["settings"]["rollout.group_size"]
    if every % cell.samples or design["most_samples"] % every or cell.samples % size:
        raise ValueError(
            f"most_samples must be a multiple of evaluate_every, that of {cell.samples} samples for an update, and "
            f"that of rollout.group_size {size}, got {design['most_samples']} and {every}"
        )
    return {
        **design["settings"],
        **design["steps"][cell.steps]["settings"],
        "rollout.groups": cell.samples // size,
        "train.learning_rate": cell.rate,
        "train.epochs": design["most_samples"] // cell.samples,
        "train.seed": cell.seed,
        "evaluation.every": every // cell.samples,
    }


def train(cell: Cell, design: Mapping[str, Any], runs: Path, deadline: float) -> None:
    """Starts or resumes a run until it ends or the deadline has passed."""
    values = {
        **settings(cell, design),
        "output.folder": str(cell.folder(runs)),
        "output.resume": True,
        "output.trackers": [],
        "output.images_every": 0,
        "output.checkpoint_every": 0,
        "output.keep": 1,
    }
    config = parse_settings([f"--{name}={value}" for name, value in values.items()])
    print(f"{cell.steps}, {cell.samples} samples, rate {cell.rate:g}, seed {cell.seed}", flush=True)
    NoiseTrainer(config, design["steps"][cell.steps]["goal"], deadline).run()


def store(result: dict[str, Any], cell: Cell, options: argparse.Namespace) -> None:
    """Writes a run into the JSON file, in the place of one of the same cell that has not ended."""
    rollouts, evaluations = curves(cell.folder(options.runs))
    points = [[round(epoch * cell.samples), reward] for epoch, reward in evaluations]
    run = {**asdict(cell), "evaluations": points, "rollouts": rollouts}
    result["runs"] = [r for r in result["runs"] if not _is(r, cell)] + [run]
    result["environment"] = environment.describe(torch.device("cpu"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result) + "\n")


def ended(run: Mapping[str, Any], design: Mapping[str, Any]) -> bool:
    """Whether a run has reached its goal or its last evaluation."""
    samples, reward = run["evaluations"][-1] if run["evaluations"] else (0, -math.inf)
    return bool(reward >= design["steps"][run["steps"]]["goal"] or samples >= design["most_samples"])


def samples_to(points: Sequence[Sequence[float]], goal: float) -> float:
    """Samples until the reward first reaches the goal, by linear interpolation; infinity if it does not."""
    for (before, low), (after, high) in pairwise(points):
        if high >= goal:
            return before + (after - before) * (goal - low) / (high - low) if low < goal else before
    return math.inf


def table(result: Mapping[str, Any]) -> dict[str, dict[int, dict[float, list[float]]]]:
    """Samples to the goal of all runs that have ended, by trained steps, samples for an update and learning rate."""
    found: dict[str, dict[int, dict[float, list[float]]]] = {}
    for run in sorted(result["runs"], key=lambda run: (run["samples"], run["rate"], run["seed"])):
        if ended(run, result["design"]):
            goal = result["design"]["steps"][run["steps"]]["goal"]
            of_rate = found.setdefault(run["steps"], {}).setdefault(run["samples"], {})
            of_rate.setdefault(run["rate"], []).append(samples_to(run["evaluations"], goal))
    return found


def text(result: Mapping[str, Any]) -> str:
    """Samples to the goal of every run."""
    lines = []
    for steps, by_samples in table(result).items():
        lines += ["", f"{steps}: samples until the reward is {result['design']['steps'][steps]['goal']:g}"]
        for samples, by_rate in by_samples.items():
            for rate, values in by_rate.items():
                lines.append(
                    f"  {samples:>4} an update, rate {rate:<8g}" + "".join(f"{value:>8.0f}" for value in values)
                )
    count = sum(ended(run, result["design"]) for run in result["runs"])
    lines += ["", f"{count} of {sum(1 for _ in cells(result['design']))} runs have ended"]
    return "\n".join(lines)


def _is(run: Mapping[str, Any], cell: Cell) -> bool:
    return all(run[name] == value for name, value in asdict(cell).items())


if __name__ == "__main__":
    sys.exit(main())
