"""Rewards for the tests of failures, used by import path."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from star_kernels.prompts import core_content

released = threading.Event()  # ends calls that hang


class Brightness:
    """The mean over pixels, which is a smooth function of the image."""

    name = "brightness"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class Moves(Brightness):
    """Changes the working directory in each call."""

    name = "moves"

    def __init__(self, to: str) -> None:
        self.to = to

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        os.chdir(self.to)
        return super().__call__(images, prompts, metadata)


class Channels(Brightness):
    """Scores each phrase by the mean of a channel, and ``more`` phrases than the prompt has."""

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
    """The only phrase of a prompt has the score of the image."""

    name = "whole"

    def by_phrase(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, Tensor]:
        scores = self(images, prompts, metadata)
        return scores, scores[:, None]


class Failing:
    """Fails after a number of calls.

    Args:
        how: "raise", "hang" or "nan"; "terminate" sends SIGTERM and scores; "die" ends the second process.
        after: number of calls that succeed.
        sample: for "nan", the index of the sample in its batch; the others are scored.
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
