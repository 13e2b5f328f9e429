"""A weighted sum of rewards that also returns the scores of each reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from star_trainer.rewards.base import Metadata, Reward, RewardError, Scores


class WeightedSum:
    """``sum_k weight_k * reward_k``.

    Args:
        rewards: the parts by name.
        weights: a weight for each of them. A part with weight 0 is scored and reported, but does not affect the total,
            even if its score is NaN.
        name: name of the sum.

    Raises:
        ValueError: no parts, rewards and weights with different names, or a weight that is not a finite number.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float], *, name: str = "sum") -> None:
        if not rewards:
            raise ValueError("rewards must contain at least one reward, got none")
        if set(rewards) != set(weights):
            raise ValueError(f"weights must name the rewards {sorted(rewards)}, got {sorted(weights)}")
        self.rewards = dict(rewards)
        self.weights = {key: check_weight(key, weights[key]) for key in rewards}
        self.name = name

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The total, float32 ``[N]``."""
        return self.scores(images, prompts, metadata).total

    def scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        """The total and its parts. Each reward receives copies, which it may change.

        Raises:
            RewardError: a part did not return one real number for each image.
        """
        parts = {}
        for key, reward in self.rewards.items():
            answer = reward(images.clone(), list(prompts), [copied(entry) for entry in metadata])
            problem = problem_with(answer, len(images))
            if problem:
                raise RewardError(f"reward {key!r} {problem}")
            parts[key] = as_scores(answer)
        return self.combine(parts)

    def combine(self, parts: Mapping[str, Tensor], phrases: Mapping[str, Tensor] | None = None) -> Scores:
        """The weighted sum of the parts' scores, and of the scores of their phrases ``[N, G]``."""
        return Scores(self._sum(parts), dict(parts), self._sum(phrases) if phrases else None)

    def _sum(self, parts: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros_like(next(iter(parts.values())))
        for key, weight in self.weights.items():
            if weight:
                total = total + weight * parts[key]
        return total


def copied(record: Metadata) -> Metadata:
    """A copy of a prompt's metadata."""
    return deepcopy(dict(record))


def check_weight(key: str, weight: object) -> float:
    """The weight as a float. Raises ValueError if it is not a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"weights must be finite numbers, got {weight!r} for {key!r}")
    return float(weight)


def problem_with(answer: object, count: int) -> str | None:
    """What is wrong with the result of a reward for ``count`` images, or None."""
    if not isinstance(answer, Tensor):
        return f"returned {type(answer).__name__}, expected a tensor of shape ({count},)"
    if tuple(answer.shape) != (count,):
        return f"returned a tensor of shape {tuple(answer.shape)}, expected ({count},)"
    if answer.is_complex():
        return f"returned {answer.dtype}, expected real numbers"
    return None


def as_scores(answer: Tensor) -> Tensor:
    """A detached float32 copy on the CPU, because the reward may reuse its buffer."""
    return answer.detach().to("cpu", torch.float32, copy=True)
