"""PickScore (Kirstain et al., 2023, arXiv 2305.01569): a CLIP model trained on human choices between images."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from star_trainer.rewards.base import Metadata
from star_trainer.rewards.clip import Clip
from star_trainer.rewards.images import to_pil


class PickScore:
    """``logit_scale * cos(image, prompt) / 26``, about 0.7..0.9 for the published weights.

    As in Flow-GRPO's ``pickscore_scorer.py``, the divisor 26 scales scores to about 1.

    Args:
        model: name or folder of the weights (safetensors).
        processor: name or folder of the processor.
        device: where the model runs.
        batch_size: number of images per forward pass.

    Raises:
        ImportError: transformers or pillow is not installed.
        OSError: the model does not exist.
    """

    name = "pickscore"

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] = "yuvalkirstain/PickScore_v1",
        processor: str | os.PathLike[str] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ) -> None:
        self.clip = Clip(model, reward=self.name, processor=processor, device=device, batch_size=batch_size)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return self.clip.similarity(to_pil(images, self.name), prompts) * (self.clip.scale / 26)
