"""What a run reports while it trains: a header, a line for each epoch and evaluation, and bars on a terminal."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from star_trainer.config import Config
from star_trainer.redact import redact

log = logging.getLogger("star_trainer")


class Progress:
    """The reports of one process.

    Args:
        enabled: False on all but the first process.
    """

    def __init__(self, config: Config, *, enabled: bool) -> None:
        self.config, self.enabled = config, enabled
        self._seconds = 0.0
        self._epochs = 0

    def header(self, model: nn.Module, device: object, processes: int, folder: Path) -> None:
        """The model, what is trained, the work of an epoch and the folder."""
        if not self.enabled:
            return
        config = self.config
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        every = sum(p.numel() for p in model.parameters())
        what = f"LoRA of rank {config.model.lora_rank}" if config.model.lora_rank else "all weights"
        steps = config.rollout.window or config.rollout.steps - 1
        where = f"{processes} processes on {device}" if processes > 1 else f"{device}"
        log.info(
            "model %s: %s trained parameters (%s) of %s, on %s",
            redact(config.model.path),
            f"{trained:,}",
            what,
            f"{every:,}",
            where,
        )
        log.info(
            "%d %s of %d samples (%d prompts x %d), %d denoising steps of which %d are trained",
            config.train.epochs,
            "epoch" if config.train.epochs == 1 else "epochs",
            config.samples,
            config.rollout.groups,
            config.rollout.group_size,
            config.rollout.steps,
            min(config.train.steps or steps, steps),
        )
        log.info("metrics, images and checkpoints: %s", folder)

    def epoch(self, number: int, metrics: Mapping[str, float]) -> None:
        """The reward of an epoch's samples, its time and the time left."""
        if not self.enabled:
            return
        parts = {name: metrics[f"seconds/{name}"] for name in ("rollout", "rewards", "update")}
        self._seconds += sum(parts.values())
        self._epochs += 1
        left = (self.config.train.epochs - number) * self._seconds / self._epochs
        log.info(
            "epoch %d/%d: reward %.4f +- %.4f, %s (%s)%s",
            number,
            self.config.train.epochs,
            metrics["reward"],
            metrics["reward_std"],
            duration(sum(parts.values())),
            ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items()),
            f", {duration(left)} left" if left else "",
        )

    def evaluation(self, number: int, reward: float) -> None:
        """The reward of the averaged weights after an epoch."""
        if self.enabled:
            log.info("evaluation after epoch %d: reward %.4f", number, reward)

    def bar(self, name: str, samples: int) -> Any:
        """A bar for a part of an epoch; tqdm shows it only on a terminal."""
        return tqdm(total=samples, desc=name, unit="sample", leave=False, disable=None if self.enabled else True)


def duration(seconds: float) -> str:
    """A time in two figures or more: "0.4 s", "12 s", "3 min 5 s", "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
