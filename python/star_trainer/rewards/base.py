"""The interfaces of rewards, their scores and their error."""

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
    """Scores images, given their prompts.

    Attributes:
        name: used in logs, in error messages and as the key of ``Scores.parts``.
    """

    name: str

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The score of each image; higher is better.

        Args:
            images: float32 ``[N, 3, H, W]`` in 0..1 on the CPU; a copy, which the reward may change.
            prompts: N texts.
            metadata: a record for each prompt (also copies): a line of GenEval's file, ``{"text": ...}`` for text
                rendering, ``{}`` for a plain prompt.

        Returns:
            float32 ``[N]`` on the CPU; NaN for samples that could not be scored.
        """
        ...


@runtime_checkable
class PromptReward(Reward, Protocol):
    """A reward that cannot score all prompts. Prompts are checked before a run begins."""

    def check_prompt(self, prompt: str, metadata: Metadata) -> None:
        """Raises ValueError with the reason if images of a prompt cannot be scored."""
        ...


@runtime_checkable
class PhraseReward(Reward, Protocol):
    """A reward that also scores each phrase of a prompt, for ``allocation.credit`` "split" and "phrase"."""

    def by_phrase(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
        """The scores of ``__call__``, and the part of each phrase in them, float32 ``[N, G]``; higher is better.

        Parts have the units of the score. The score is their sum plus what belongs to no phrase, if it is a sum.
        Phrases are those of ``star_kernels.prompts.core_content(prompt, metadata=metadata)``, in the same order. G is
        at least the largest number of phrases of a prompt; the parts of prompts with fewer are padded with NaN.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """The scores of a batch.

    Args:
        total: weighted sum of the rewards, which the policy is trained on, float32 ``[N]``.
        parts: scores of each reward before weighting, float32 ``[N]``, by its name.
        phrases: weighted sum of the scores of each phrase, float32 ``[N, G]``, padded with NaN; None if they were not
            requested.
    """

    total: Tensor
    parts: dict[str, Tensor]
    phrases: Tensor | None = None
