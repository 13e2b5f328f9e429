"""What a run writes for people: metrics.jsonl, TensorBoard, sample grids, allocation strips and the reward curve."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from star_kernels import figures
from star_kernels.captions import LITERAL, caption
from star_trainer.config import Config
from star_trainer.redact import redacted
from star_trainer.rollout import Batch

COLUMNS, MOST = 8, 32  # pictures of a grid
STRIPS = 3


class Record:
    """Writes to the run's folder; a disabled one, of all but the first process, writes nothing.

    Args:
        resumed_at: epochs done; later lines of metrics.jsonl, of a run that was cut off, are dropped.
    """

    def __init__(self, config: Config, *, enabled: bool, resumed_at: int = 0) -> None:
        self.config, self.enabled = config, enabled
        self.folder = Path(config.output.folder)
        self.board: Any = None
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(self.folder) if resumed_at else []
        kept = [line for line in lines if line["epoch"] <= resumed_at]
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        (self.folder / "config.json").write_text(json.dumps(redacted(asdict(config)), indent=1))
        if config.output.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resumed_at or None)

    def metrics(self, event: str, epoch: int, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        line = {"event": event, "epoch": epoch, **{name: round(value, 8) for name, value in values.items()}}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{event}/{name}", value, epoch)
        if event == "evaluation":
            self._curve()

    def samples(self, epoch: int, images: list[Tensor], prompts: list[str], scores: list[float]) -> None:
        """A grid of evaluation samples with their prompts and rewards."""
        if self.enabled:
            titles = [f"{score:.2f}: {prompt}" for prompt, score in zip(prompts, scores, strict=True)]
            grid(images[:MOST], titles[:MOST]).savefig(self.folder / f"samples-{epoch:06d}.png", dpi=90)

    def allocation(self, epoch: int, batch: Batch) -> None:
        """The weights of the first samples over space and trained steps."""
        if not self.enabled or not batch.steps or batch.steps[0].weights is None:
            return
        labels = [f"step {step.number}" for step in batch.steps]
        for n in range(min(STRIPS, len(batch.numbers))):
            values = torch.stack([step.weights[n] for step in batch.steps if step.weights is not None])
            if self.config.allocation.credit == "split":
                values = values[:, 0]  # by the map of all phrases
            elif batch.shares is not None:  # the mean over phrases
                values = torch.einsum("tghw, g -> thw", values, batch.shares[n])
            figure = figures.weights(
                values,
                image=batch.images[n],
                labels=labels,
                title=batch.prompts[n].text,
            )
            figure.savefig(self.folder / f"allocation-{epoch:06d}-{n}.png", dpi=90)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def _curve(self) -> None:
        curve(read_metrics(self.folder)).savefig(self.folder / "reward.png", dpi=110)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that was cut off while it was written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def grid(images: list[Tensor], titles: list[str]) -> Figure:
    """Pictures ``[3, H, W]`` in 0..1 with their titles."""
    rows = -(-len(images) // COLUMNS)
    columns = min(COLUMNS, len(images))
    figure = Figure(figsize=(1.6 * columns, 1.95 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(figures.picture(image), interpolation="nearest")
        axis.set_title(caption(title, 24), fontsize=7, **LITERAL)
    return figure


def curve(lines: list[dict[str, Any]]) -> Figure:
    """Reward over epochs: of the rollouts, and of evaluations."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("epoch", "rollout samples (with noise)", {"color": "#56B4E9", "linewidth": 1.0}),
        ("evaluation", "evaluation (averaged weights)", {"color": "#D55E00", "marker": "o", "linewidth": 1.6}),
    )
    for event, label, style in styles:
        chosen = [line for line in lines if line["event"] == event]
        axis.plot([line["epoch"] for line in chosen], [line["reward"] for line in chosen], label=label, **style)
    axis.set(xlabel="epoch", ylabel="reward")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return figure
