"""What the driver needs to know about a family of models, and the text embeddings that it passes to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

SCHEDULER = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Text:
    """Text embeddings of prompts.

    Args:
        tokens: ``[B, L, D]``.
        pooled: ``[B, P]``; None if the model has none.
        lengths: number of tokens of each prompt, int64 ``[B]`` in main memory; the others are padding. None: all are L.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    lengths: Tensor | None = None

    def __getitem__(self, rows: Any) -> Text:
        """The embeddings of a slice, or of an index tensor in main memory."""
        pooled, lengths = (part if part is None else part[rows] for part in (self.pooled, self.lengths))
        return Text(self.tokens[rows], pooled, lengths)

    def to(self, device: torch.device | str) -> Text:
        return Text(self.tokens.to(device), None if self.pooled is None else self.pooled.to(device), self.lengths)

    @property
    def mask(self) -> Tensor | None:
        """Which tokens are not padding, bool ``[B, L]``; None if none is."""
        longest = self.tokens.shape[1]
        if self.lengths is None or bool((self.lengths == longest).all()):
            return None
        return (torch.arange(longest) < self.lengths[:, None]).to(self.tokens.device)

    def unpadded(self) -> list[Tensor]:
        """The tokens ``[length, D]`` of each prompt."""
        lengths = [self.tokens.shape[1]] * len(self.tokens) if self.lengths is None else self.lengths.tolist()
        return [tokens[:length] for tokens, length in zip(self.tokens, lengths, strict=True)]

    @staticmethod
    def joined(parts: Sequence[Text]) -> Text:
        """The rows of all parts, padded with zeros to the longest prompt."""
        if any(part.lengths is not None for part in parts):
            return padded([row for part in parts for row in part.unpadded()])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Text(torch.cat([part.tokens for part in parts]), torch.cat(pooled) if pooled else None)


def padded(rows: Sequence[Tensor]) -> Text:
    """Text embeddings of prompts with different numbers of tokens, ``[length, D]`` each, without pooled ones."""
    return Text(
        torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), lengths=torch.tensor([len(row) for row in rows])
    )


class Base(ABC):
    """A family of models.

    Latents are ``[B, C, h, w]`` everywhere in the driver; a base whose transformer takes a sequence packs them itself.
    Velocities point from the image to the noise: ``sample + (sigma_next - sigma) * velocity`` is a step.

    Args:
        pipeline: of diffusers.
        text_length: maximum number of tokens, ``max_sequence_length`` of the pipeline.
        guidance: ``rollout.guidance``.

    Attributes:
        doubled: whether guidance needs a second prediction, with the empty prompt.

    Raises:
        ValueError: a setting that the model cannot follow.
    """

    lora_targets: ClassVar[tuple[str, ...]]
    text_limit: ClassVar[int] = 512

    def __init__(self, pipeline: Any, *, text_length: int, guidance: float) -> None:
        self.pipeline, self.text_length, self.guidance = pipeline, text_length, guidance
        self.doubled = guidance > 1
        name, scheduler = type(pipeline).__name__, type(pipeline.scheduler).__name__
        if scheduler != SCHEDULER:
            raise ValueError(f"model.path must be a pipeline whose scheduler is a {SCHEDULER}, got a {scheduler}")
        if text_length > self.text_limit:
            raise ValueError(f"model.text_length must be at most {self.text_limit} for {name}, got {text_length}")

    @abstractmethod
    def encode(self, prompts: list[str], device: torch.device) -> Text:
        """Text embeddings, equal to the pipeline's."""

    @abstractmethod
    def predict(self, model: Any, latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """The velocity of the transformer or of its distributed wrapper, without guidance by a second prediction.

        Args:
            latents: ``[B, C, h, w]`` in the transformer's dtype.
            timestep: 1000 sigma, float32 ``[B]``.
        """

    def combine(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """The velocity after guidance by a second prediction."""
        return unconditional + self.guidance * (conditional - unconditional)

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in -1..1 of latents in the dtype of the VAE."""
        config = self.pipeline.vae.config
        images: Tensor = self.pipeline.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample
        return images

    def sigmas(self, steps: int) -> list[float] | None:
        """The noise levels before the scheduler's shift; None leaves them to the scheduler."""
        return torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()

    def without_effect(self) -> list[str]:
        """Modules of the transformer whose weights do not affect the velocity; they are not trained."""
        return []

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.pipeline.transformer.config.in_channels) // 4  # of 2 x 2 latents in a token

    @property
    def patch(self) -> int:
        """Rows, and columns, of latents that are one token."""
        return 2

    @property
    def default_side(self) -> int:
        """Rows, and columns, of latents that the pipeline has by default."""
        return int(self.pipeline.default_sample_size)


def packed(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` as the tokens ``[B, h / 2 * w / 2, 4 C]`` of FLUX and Qwen-Image."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`packed`; ``like`` has the rows and columns of the latents."""
    rows, columns = like.shape[-2] // 2, like.shape[-1] // 2
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)
