"""Rewards that the failure tests name by import path."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

released = threading.Event()  # lets the calls go that hang


class Brightness:
    """The mean over pixels: smooth, where a file's size jumps with a rounding."""

    name = "brightness"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


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
