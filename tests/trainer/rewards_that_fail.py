"""Rewards that the failure tests name by import path."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from star_kernels.prompts import core_content

released = threading.Event()  # lets the calls go that hang


class Brightness:
    """The mean over pixels: smooth, where a file's size jumps with a rounding."""

    name = "brightness"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class Moves(Brightness):
    """Changes the working directory."""

    name = "moves"

    def __init__(self, to: str) -> None:
        self.to = to

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        os.chdir(self.to)
        return super().__call__(images, prompts, metadata)


class Channels(Brightness):
    """Scores a prompt's phrases too, each by a channel's mean, and ``more`` than it has."""

    name = "channels"

    def __init__(self, more: int = 0) -> None:
        self.more = more

    def by_phrase(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, Tensor]:
        phrases = torch.full((len(images), 6), torch.nan)
        for row, image, prompt, entry in zip(phrases, images, prompts, metadata, strict=True):
            count = len(core_content(prompt, metadata=entry).phrases) + self.more
            row[:count] = image.mean(dim=(1, 2)).repeat(2)[:count]
        return self(images, prompts, metadata), phrases


class Whole(Brightness):
    """The one phrase of a prompt has the score of its picture."""

    name = "whole"

    def by_phrase(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, Tensor]:
        scores = self(images, prompts, metadata)
        return scores, scores[:, None]


class Failing:
    """Does something else than scoring, from some call on.

    Args:
        how: "raise", "hang", "nan"; "terminate": sends SIGTERM to the process and scores; "die": ends the second one.
        after: calls that go well before.
        sample: for "nan", the one's position in its batch; the others are scored by brightness.
    """

    name = "failing"

    def __init__(self, how: str, after: int = 0, sample: int = 0) -> None:
        self.how, self.left, self.sample = how, after, sample

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        scores = images.mean(dim=(1, 2, 3)) + 0.1 * torch.arange(len(images))
        self.left -= 1
        if self.left >= 0:
            return scores
        if self.how == "raise":
            raise OSError("no answer from the judge")
        if self.how == "hang":
            released.wait()
        if self.how == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.how == "die" and os.environ.get("RANK") == "1":
            os._exit(3)
        if self.how == "nan":
            scores[self.sample] = torch.nan
        return scores
