"""A reward whose behaviour each test of the reward service can choose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from star_trainer.rewards import Pending, RewardService

PROMPTS = ["a cat", "a dog", "a bad bench", "a clock"]


class Brightness:
    """The mean of each image. ``act`` is called with the prompts; it may raise, wait, or return the scores."""

    def __init__(self, act: Callable[[Sequence[str]], Tensor | None] | None = None, name: str = "brightness") -> None:
        self.name = name
        self.act = act
        self.calls: list[list[str]] = []
        self.threads: list[threading.Thread] = []

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[object]) -> Tensor:
        self.calls.append(list(prompts))
        self.threads.append(threading.current_thread())
        answer = self.act(prompts) if self.act else None
        return images.mean((1, 2, 3)) if answer is None else answer


def fails_on(word: str) -> Callable[[Sequence[str]], None]:
    def act(prompts: Sequence[str]) -> None:
        if any(word in prompt for prompt in prompts):
            raise KeyError("no such thing")

    return act


def waits_for(event: threading.Event) -> Callable[[Sequence[str]], None]:
    def act(prompts: Sequence[str]) -> None:
        event.wait()

    return act


def submit(service: RewardService, images: Tensor, prompts: Sequence[str] = PROMPTS) -> Pending:
    return service.submit(images, prompts, [{}] * len(prompts), indices=range(10, 10 + len(prompts)))
