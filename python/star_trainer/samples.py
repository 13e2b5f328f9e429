"""The samples of a rollout: the trained steps of a batch, and what the update needs to know about them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from star_trainer.policy import Text
from star_trainer.prompts import Prompt


@dataclass(frozen=True)
class Step:
    """One trained denoising step of a batch.

    Attributes:
        number: index of the step in the schedule.
        sample: latents before the step, ``[B, C, h, w]``.
        prev_sample: latents after the step, of the same shape.
        log_prob: log-probability of the transition under the policy that sampled it, ``[B, h, w]``.
        model_output: the velocity that was sampled with, kept for ``train.ratio_norm``; else None.
        weights: allocation weights on the grid of patches: None (uniform), ``[B, rows, columns]``, or, with credit by
            phrase, ``[B, G, rows, columns]``.
    """

    number: int
    sample: Tensor
    prev_sample: Tensor
    log_prob: Tensor
    model_output: Tensor | None
    weights: Tensor | None

    def at(self, rows: slice) -> Step:
        """The step for a slice of the batch."""
        return replace(
            self,
            sample=self.sample[rows],
            prev_sample=self.prev_sample[rows],
            log_prob=self.log_prob[rows],
            model_output=None if self.model_output is None else self.model_output[rows],
            weights=None if self.weights is None else self.weights[rows],
        )


@dataclass(frozen=True)
class Batch:
    """Samples that were drawn in one forward pass per step.

    Attributes:
        numbers: index of each sample within its epoch.
        prompts: prompt of each sample.
        text: text embeddings of the prompts.
        steps: the trained steps, in order.
        images: decoded images ``[B, 3, H, W]`` in 0..1.
        shares: with credit by phrase, :func:`star_trainer.credit.phrase_shares` ``[B, G]``; else None.
        shown: weights of further steps that are drawn beside those of ``steps``, by the index of the step.
    """

    numbers: list[int]
    prompts: list[Prompt]
    text: Text
    steps: list[Step]
    images: Tensor
    shares: Tensor | None = None
    shown: dict[int, Tensor] = field(default_factory=dict)
