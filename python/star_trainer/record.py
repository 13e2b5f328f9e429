"""Writes metrics.jsonl, TensorBoard files, sample grids, allocation figures and the reward curve of a run."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from star_kernels import figures
from star_kernels.captions import LITERAL, caption
from star_trainer.config import Config
from star_trainer.credit import overall_weights
from star_trainer.redact import redacted
from star_trainer.samples import Batch

COLUMNS, MOST = 3, 15  # columns and prompts of a sample grid
STRIPS = 3  # allocation figures per epoch
BETTER, WORSE, INK = "#00704F", "#B93C00", "#333333"  # colours of rewards


class Record:
    """Writes to the run's folder.

    An output that cannot be written does not end the run; each kind of output warns once (RuntimeWarning).

    Args:
        enabled: False on all but the first process: nothing is written.
        resumed_at: number of completed epochs; later lines of metrics.jsonl, from a run that was killed, are removed.
        folder: the run's folder; None is ``config.output.folder``.

    Attributes:
        evaluated: epochs with an evaluation.
    """

    def __init__(self, config: Config, *, enabled: bool, resumed_at: int = 0, folder: Path | None = None) -> None:
        self.config, self.enabled = config, enabled
        self.folder = folder or Path(config.output.folder)
        self.board: Any = None
        self._first: tuple[int, list[Tensor], list[float]] | None = None  # of the first evaluation
        self.evaluated: set[int] = set()
        self._warned: set[str] = set()
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(self.folder) if resumed_at else []
        kept = [line for line in lines if line["epoch"] <= resumed_at]
        self.evaluated = {line["epoch"] for line in kept if line["event"] == "evaluation"}
        _replace(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        _replace(self.folder / "config.json", json.dumps(redacted(asdict(config)), indent=1))
        if config.output.tensorboard:
            with self._spared("the TensorBoard files"):
                from torch.utils.tensorboard import SummaryWriter

                # The writer's thread ends at an error, after which a full queue would block forever.
                self.board = SummaryWriter(
                    str(self.folder / "tensorboard"), purge_step=resumed_at or None, max_queue=10_000
                )

    def metrics(self, event: str, epoch: int, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        line = {"event": event, "epoch": epoch, **{name: round(value, 8) for name, value in values.items()}}
        with self._spared("metrics.jsonl"), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            with self._spared("the TensorBoard files"):
                for name, value in values.items():
                    self.board.add_scalar(f"{event}/{name}", value, epoch)
        if event == "evaluation":
            with self._spared("reward.png"):
                curve(read_metrics(self.folder)).savefig(self.folder / "reward.png", dpi=110)

    def samples(self, epoch: int, images: list[Tensor], prompts: list[str], scores: list[float]) -> None:
        """Draws a grid of evaluation samples with their rewards, beside those of this process's first evaluation."""
        if not self.enabled or not self.config.output.images_every:
            return
        self._first = self._first or (epoch, images[:MOST], scores)
        with self._spared("sample grids"):
            before, pictures, old = self._first
            if before == epoch:
                figure = grid(images[:MOST], prompts[:MOST], notes=[(f"{score:.2f}", INK) for score in scores])
            else:
                figure = grid(
                    [_beside(*pair) for pair in zip(pictures, images, strict=False)],
                    prompts[:MOST],
                    notes=[
                        (f"{a:.2f} → {b:.2f}", BETTER if b > a else WORSE if b < a else INK)
                        for a, b in zip(old, scores, strict=True)
                    ],
                    title=f"epoch {before} (left) and epoch {epoch} (right), with rewards",
                )
            figure.savefig(self.folder / f"samples-{epoch:06d}.png", dpi=150)

    def allocation(self, epoch: int, batch: Batch, scores: Tensor) -> None:
        """Draws the weights of the trained steps and those of ``batch.shown``, every ``images_every`` epochs.

        They are those of the sample with the highest reward, for each of the first ``STRIPS`` prompts of the batch.
        """
        if not self.enabled or not self.config.output.draws(epoch):
            return
        if batch.steps and batch.steps[0].weights is not None:
            with self._spared("allocation figures"):
                self._strips(epoch, batch, scores)

    def close(self) -> None:
        if self.board is not None:
            with self._spared("the TensorBoard files"):
                self.board.close()

    def _strips(self, epoch: int, batch: Batch, scores: Tensor) -> None:
        steps = {**batch.shown, **{step.number: step.weights for step in batch.steps if step.weights is not None}}
        trained = {step.number for step in batch.steps}
        labels = [f"step {step}" + " (trained)" * (step in trained) for step in sorted(steps)]
        best: dict[int, int] = {}  # row of each prompt's best sample
        for row in scores.nan_to_num(-torch.inf).argsort(stable=True).tolist():
            best[batch.numbers[row] // self.config.rollout.group_size] = row
        for file, n in enumerate([row for _, row in sorted(best.items())][:STRIPS]):
            values = torch.stack([steps[step][n] for step in sorted(steps)])
            shares = None if batch.shares is None else batch.shares[n]
            figure = figures.weights(
                overall_weights(values, shares, self.config.allocation),
                image=batch.images[n],
                labels=labels,
                title=f"{batch.prompts[n].text} (reward {scores[n]:.2f})",
            )
            width, height = figure.get_size_inches()
            figure.set_size_inches(0.6 * width, 0.7 * height)
            figure.savefig(self.folder / f"allocation-{epoch:06d}-{file}.png", dpi=200)

    @contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        """Turns an exception into a warning, once for each kind of output."""
        try:
            yield
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                warnings.warn(
                    f"{what} in {self.folder} cannot be written; the run continues without: {error!r}",
                    RuntimeWarning,
                    stacklevel=3,
                )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; malformed lines, for example truncated ones, are left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if (
            isinstance(record, dict)
            and isinstance(record.get("event"), str)
            and type(record.get("epoch")) is int
            and type(record.get("reward")) in (int, float)
        ):
            found.append(record)
    return found


def _replace(path: Path, text: str) -> None:
    """Replaces a file atomically."""
    work = path.with_name(f".{path.name}.tmp")
    work.write_text(text)
    os.replace(work, path)


def grid(
    images: Sequence[Tensor],
    titles: Sequence[str],
    *,
    notes: Sequence[tuple[str, str]] = (),
    columns: int = COLUMNS,
    title: str = "",
) -> Figure:
    """A grid of images ``[3, H, W]`` in 0..1, with titles above and notes below, each a text and its colour."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = images[0].shape[1:]
    side = figures.PANEL
    figure = Figure(figsize=(side * columns, (side * height / width + 0.62) * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, image, text in zip(axes.flat, images, titles, strict=False):
        axis.imshow(figures.to_rgb(image), interpolation="nearest")
        axis.set_title(caption(text, 28, lines=2), fontsize=9, **LITERAL)
    for axis, (text, color) in zip(axes.flat, notes, strict=False):
        axis.set_xlabel(text, color=color, fontsize=11, fontweight="bold")
    figure.suptitle(title, fontsize=10, **LITERAL)
    return figure


def _beside(left: Tensor, right: Tensor) -> Tensor:
    return torch.cat([left, left.new_ones(3, left.shape[1], max(1, left.shape[2] // 16)), right], dim=2)


def curve(lines: list[dict[str, Any]]) -> Figure:
    """The reward of rollouts and evaluations over epochs."""
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
