"""What a reward is, what its scores look like, and how it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Metadata = Mapping[str, Any]


class RewardError(RuntimeError):
    """A reward could not score a sample; the message names the reward, the sample and the cause."""


@runtime_checkable
class Reward(Protocol):
    """Scores images by their prompts.

    ``name`` stands in logs, in error messages and as the key of ``Scores.parts``.
    """

    name: str

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The score of each image; higher is better.

        Args:
            images: float32 ``[N, 3, H, W]`` in 0..1 on the CPU; the reward's own copy, as the metadata.
            prompts: N texts.
            metadata: each prompt's own record: a GenEval line, ``{"text": ...}`` for text rendering, ``{}`` for a plain
                prompt.

        Returns:
            float32 ``[N]`` on the CPU. NaN says that a sample could not be scored.
        """
        ...


@runtime_checkable
class PromptReward(Reward, Protocol):
    """A reward that cannot score every prompt and says which, so that a run does not begin with one of them."""

    def check_prompt(self, prompt: str, metadata: Metadata) -> None:
        """Raises ValueError where images of a prompt could not be scored, with the reason."""
        ...


@runtime_checkable
class PhraseReward(Reward, Protocol):
    """A reward that scores the phrases of a prompt separately too, for ``allocation.credit`` "split" and "phrase"."""

    def by_phrase(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
        """The scores of a call, and each phrase's part of them, float32 ``[N, G]``; higher is better.

        Parts are in the units of the score; they and what is no phrase's sum to it, as far as it is a sum.
        Phrases are those of ``star_kernels.prompts.core_content(prompt, metadata=metadata)``, in its order. G is at
        least the largest number of phrases of a prompt, and NaN stands where a prompt has fewer.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """The scores of a batch.

    Args:
        total: float32 ``[N]``, what the policy is trained on.
        parts: each reward's own scores by its name, float32 ``[N]``, before weighting.
        phrases: the weighted sum of each phrase's scores, float32 ``[N, G]``, NaN where a prompt has fewer phrases;
            None where they were not asked for.
    """

    total: Tensor
    parts: dict[str, Tensor]
    phrases: Tensor | None = None
