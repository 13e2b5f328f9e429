"""Writes the metrics, figures and model card of a run to its folder, and metrics and figures to trackers."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from star_kernels import figures
from star_kernels.captions import LITERAL, caption
from star_trainer import hub, trackers
from star_trainer.config import Config
from star_trainer.credit import overall_weights
from star_trainer.redact import redacted
from star_trainer.samples import Batch

COLUMNS, MOST = 8, 32  # columns and images of a sample grid
STRIPS = 3  # allocation figures per epoch


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
        self.trackers: list[Any] = []
        self.evaluated: set[int] = set()
        self._warned: set[str] = set()
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(self.folder) if resumed_at else []
        kept = [line for line in lines if line["epoch"] <= resumed_at]
        self.evaluated = {line["epoch"] for line in kept if line["event"] == "evaluation"}
        _replace(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        settings = redacted(asdict(config))
        _replace(self.folder / "config.json", json.dumps(settings, indent=1))
        for name in config.output.trackers:
            with self._spared(f"the records of {name}"):
                self.trackers.append(trackers.start(name, self.folder.absolute(), settings, resumed_at))

    def metrics(self, event: str, epoch: int, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        line = {"event": event, "epoch": epoch, **{name: round(value, 8) for name, value in values.items()}}
        with self._spared("metrics.jsonl"), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        named = {f"{event}/{name}": value for name, value in values.items()}
        self._track(lambda tracker: trackers.log(tracker, named, epoch))
        if event == "evaluation":
            with self._spared("reward.png"):
                curve(read_metrics(self.folder)).savefig(self.folder / "reward.png", dpi=110)

    def samples(self, epoch: int, images: list[Tensor], prompts: list[str], scores: list[float]) -> None:
        """Draws a grid of evaluation samples with their prompts and rewards."""
        if not self.enabled or not self.config.output.images_every:
            return
        with self._spared("sample grids"):
            titles = [f"{score:.2f}: {prompt}" for prompt, score in zip(prompts, scores, strict=True)]
            self._draw(grid(images[:MOST], titles[:MOST]), f"samples-{epoch:06d}.png", "samples", epoch)

    def allocation(self, epoch: int, batch: Batch) -> None:
        """Draws the weights of the first samples over space and trained steps, every ``images_every`` epochs."""
        every = self.config.output.images_every
        if not self.enabled or not every or (epoch > 1 and epoch % every):
            return
        if batch.steps and batch.steps[0].weights is not None:
            with self._spared("allocation figures"):
                self._strips(epoch, batch)

    def publish(self, folder: Path, epochs: int) -> None:
        """Writes the model card into the folder of the exported weights, and uploads the folder after the last epoch.

        Args:
            epochs: number of completed epochs.
        """
        if not self.enabled:
            return
        with self._spared("the model card"):
            image = self.folder / "reward.png"
            if image.is_file():
                shutil.copy(image, folder)
            shown = image.name if image.is_file() else None
            _replace(folder / "README.md", hub.model_card(self.config, epochs, read_metrics(self.folder), image=shown))
        repository = self.config.output.push_to_hub
        if repository and epochs >= self.config.train.epochs:
            with self._spared(f"the repository {repository} with the weights"):
                hub.upload(folder, repository)

    def close(self) -> None:
        self._track(lambda tracker: tracker.finish())

    def _track(self, act: Callable[[Any], None]) -> None:
        """Acts on each tracker; the failure of one does not affect others."""
        for tracker in self.trackers:
            with self._spared(f"the records of {tracker.name}"):
                act(tracker)

    def _draw(self, figure: Figure, file: str, name: str, epoch: int) -> None:
        path = self.folder / file
        figure.savefig(path, dpi=90)
        self._track(lambda tracker: trackers.log_image(tracker, name, path, epoch))

    def _strips(self, epoch: int, batch: Batch) -> None:
        labels = [f"step {step.number}" for step in batch.steps]
        for n in range(min(STRIPS, len(batch.numbers))):
            values = torch.stack([step.weights[n] for step in batch.steps if step.weights is not None])
            shares = None if batch.shares is None else batch.shares[n]
            figure = figures.weights(
                overall_weights(values, shares, self.config.allocation),
                image=batch.images[n],
                labels=labels,
                title=batch.prompts[n].text,
            )
            self._draw(figure, f"allocation-{epoch:06d}-{n}.png", f"allocation/{n}", epoch)

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


def grid(images: list[Tensor], titles: list[str]) -> Figure:
    """A grid of images ``[3, H, W]`` in 0..1 with their titles."""
    rows = -(-len(images) // COLUMNS)
    columns = min(COLUMNS, len(images))
    figure = Figure(figsize=(1.6 * columns, 1.95 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(figures.to_rgb(image), interpolation="nearest")
        axis.set_title(caption(title, 24), fontsize=7, **LITERAL)
    return figure


def curve(lines: list[dict[str, Any]]) -> Figure:
    """The reward of rollouts and evaluations over epochs and, if there are several, each of them."""
    parts = list(dict.fromkeys(name for line in lines for name in line if name.startswith("reward/")))
    names = ["reward", *(parts if len(parts) > 1 else [])]
    figure = Figure(figsize=(6.4, 3.6 * len(names)), layout="constrained")
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("epoch", "rollout samples (with noise)", {"color": "#56B4E9", "linewidth": 1.0}),
        ("evaluation", "evaluation (averaged weights)", {"color": "#D55E00", "marker": "o", "linewidth": 1.6}),
    )
    for name, axis in zip(names, figure.subplots(len(names), squeeze=False).flat, strict=True):
        for event, label, style in styles:
            chosen = [line for line in lines if line["event"] == event and name in line]
            axis.plot([line["epoch"] for line in chosen], [line[name] for line in chosen], label=label, **style)
        axis.set_xlabel("epoch")
        axis.set_ylabel(caption(name, 40), **LITERAL)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    return figure
