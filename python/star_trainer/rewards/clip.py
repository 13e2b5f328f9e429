"""A CLIP model: normalised features of images and texts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from star_trainer.rewards.extras import require
from star_trainer.rewards.images import slices
from star_trainer.rewards.options import check_number, check_path, device_of

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_TOKENS = 77


class Clip:
    """A CLIP model of transformers.

    Args:
        model: name on the Hugging Face hub or a local folder; the weights must be safetensors.
        reward: name of the reward that uses it, for error messages.
        processor: name or folder of the processor; None uses that of the model.
        device: where the model runs.
        batch_size: number of images or texts per forward pass.
        dtype: dtype of the weights.

    Raises:
        TypeError, ValueError: an option of another type or out of range.
        ImportError: transformers is not installed.
        OSError: the model does not exist or has no safetensors.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        reward: str,
        processor: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_path("model", model)
        if processor is not None:
            check_path("processor", processor)
        check_number("batch_size", batch_size, at_least=1, whole=True)
        self.device = device_of(device)
        transformers = require("transformers", reward)
        require("PIL.Image", reward)
        self.dtype = dtype
        self.batch_size = batch_size
        self.processor = transformers.CLIPProcessor.from_pretrained(model if processor is None else processor)
        self.model = transformers.CLIPModel.from_pretrained(model, use_safetensors=True)
        self.model.to(device=self.device, dtype=dtype).eval().requires_grad_(False)

    @property
    def scale(self) -> float:
        """The factor between the cosine similarity and CLIP's logits."""
        return float(self.model.logit_scale.exp())

    @property
    def width(self) -> int:
        """Number of features."""
        return int(self.model.config.projection_dim)

    @torch.inference_mode()
    def images(self, images: Sequence[Image]) -> Tensor:
        """Features of length 1, float32 ``[N, width]`` on the CPU, after the processor's resizing and cropping."""
        features = []
        for part in slices(len(images), self.batch_size):
            inputs = self.processor(images=list(images[part]), return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.device, self.dtype)
            features.append(_pooled(self.model.get_image_features(pixel_values=pixels)))
        return self._joined(features)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of length 1, float32 ``[N, width]`` on the CPU; texts are truncated to 77 tokens."""
        features = []
        for part in slices(len(texts), self.batch_size):
            inputs = self.processor(
                text=list(texts[part]), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(self.device)
            features.append(
                _pooled(
                    self.model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
                )
            )
        return self._joined(features)

    def similarity(self, images: Sequence[Image], texts: Sequence[str]) -> Tensor:
        """Cosine similarity of each image and its text, float32 ``[N]`` on the CPU."""
        return (self.images(images) * self.texts(texts)).sum(-1)

    def _joined(self, features: list[Tensor]) -> Tensor:
        if not features:
            return torch.empty(0, self.width)
        return normalize(torch.cat(features).float(), dim=-1).cpu()


def _pooled(output: Any) -> Tensor:
    """The projected features: transformers 4 returns a tensor, transformers 5 an output object."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
