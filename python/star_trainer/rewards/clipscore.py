"""CLIPScore: CLIP's similarity of image and prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from star_trainer.rewards.base import Metadata
from star_trainer.rewards.clip import Clip
from star_trainer.rewards.images import to_pil


class ClipScore:
    """``logit_scale * cos(image, prompt) / 30``, as in Flow-GRPO (``flow_grpo/clip_scorer.py``); at best about 1.

    Flow-GRPO resizes the float image with torchvision's bilinear filter; here CLIP's processor resizes the 8-bit image
    with its bicubic filter. Scores differ in the third digit.

    Args:
        model: name or folder of the weights (safetensors) and the processor.
        device: where the model runs.
        batch_size: number of images per forward pass.

    Raises:
        ImportError: transformers or pillow is not installed.
        OSError: the model does not exist.
    """

    name = "clipscore"

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] = "openai/clip-vit-large-patch14",
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ) -> None:
        self.clip = Clip(model, reward=self.name, device=device, batch_size=batch_size)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return self.clip.similarity(to_pil(images, self.name), prompts) * (self.clip.scale / 30)
