"""LAION's aesthetic predictor: linear layers on CLIP's image features.

The head is ``sac+logos+ava1-l14-linearMSE`` of github.com/christophschuhmann/improved-aesthetic-predictor: linear
layers 768, 1024, 128, 64, 16, 1 with dropout in training and no activations. It is published as a pickle. If you trust
the file, convert it to safetensors::

    safetensors.torch.save_file(torch.load("head.pth", weights_only=True), "head.safetensors")
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from star_trainer.rewards.base import Metadata
from star_trainer.rewards.clip import Clip
from star_trainer.rewards.extras import require
from star_trainer.rewards.images import to_pil
from star_trainer.rewards.options import check_path

_KEY = re.compile(r"layers\.(\d+)\.(weight|bias)")


class Aesthetic:
    """The predicted rating of an image, about 1..10, independent of the prompt; as in ddpo and Flow-GRPO.

    Args:
        head: the safetensors file of the linear layers, ``layers.{i}.weight`` and ``layers.{i}.bias``.
        model: name or folder of the CLIP weights (safetensors) and the processor.
        device: where CLIP runs.
        batch_size: number of images per forward pass.

    Raises:
        ValueError: head is missing, or its layers do not map CLIP's features to one number.
        FileNotFoundError: the file does not exist.
        ImportError: transformers, safetensors or pillow is not installed.
        OSError: the model does not exist.
    """

    name = "aesthetic"

    def __init__(
        self,
        *,
        head: str | os.PathLike[str] | None = None,
        model: str | os.PathLike[str] = "openai/clip-vit-large-patch14",
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ) -> None:
        if head is None:
            raise ValueError(
                "aesthetic requires the option 'head': a safetensors file with the linear layers of the predictor"
            )
        check_path("head", head)
        if not Path(head).is_file():
            raise FileNotFoundError(f"aesthetic: head must be an existing file, got {os.fspath(head)!r}")
        tensors = require("safetensors.torch", self.name).load_file(head)
        self.clip = Clip(model, reward=self.name, device=device, batch_size=batch_size)
        self.layers = linear_chain(tensors, self.clip.width)

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        values = self.clip.images(to_pil(images, self.name))
        for weight, bias in self.layers:
            values = linear(values, weight, bias)
        return values[:, 0]


def linear_chain(tensors: Mapping[str, Tensor], width: int) -> list[tuple[Tensor, Tensor]]:
    """The (weight ``[out, in]``, bias ``[out]``) of each layer in order, float32.

    Raises:
        ValueError: other keys, or layers that do not map ``width`` numbers to one.
    """
    numbers = sorted({int(match[1]) for key in tensors if (match := _KEY.fullmatch(key))})
    expected = {f"layers.{number}.{part}" for number in numbers for part in ("weight", "bias")}
    if not numbers or set(tensors) != expected:
        raise ValueError(
            f"head must contain layers.N.weight and layers.N.bias for each linear layer, got {sorted(tensors)}"
        )
    layers = [(tensors[f"layers.{n}.weight"].float(), tensors[f"layers.{n}.bias"].float()) for n in numbers]
    fits = all(weight.dim() == 2 and bias.shape == weight.shape[:1] for weight, bias in layers)
    fits = fits and all(this.shape[0] == following.shape[1] for (this, _), (following, _) in pairwise(layers))
    if not (fits and layers[0][0].shape[1] == width and layers[-1][0].shape[0] == 1):
        shapes = [tuple(weight.shape) for weight, _ in layers]
        raise ValueError(f"head must map {width} features to one number, got layers of shape {shapes}")
    return layers
