"""JPEG compressibility: smaller files score higher. A reward without a model, for smoke tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from star_trainer.rewards.base import Metadata
from star_trainer.rewards.images import encode, to_pil
from star_trainer.rewards.options import check_number


class JpegCompressibility:
    """``-size / divisor``, where size is that of the JPEG file in kilobytes (1000 bytes).

    Args:
        quality: JPEG quality, 1..95.
        divisor: 500 is Flow-GRPO's reward (``flow_grpo/rewards.py``), 1 is ddpo's (``ddpo_pytorch/rewards.py``).

    Raises:
        TypeError, ValueError: a quality outside 1..95, or a divisor that is not positive.
    """

    name = "jpeg-compressibility"

    def __init__(self, *, quality: int = 95, divisor: float = 500.0) -> None:
        check_number("quality", quality, at_least=1, at_most=95, whole=True)
        check_number("divisor", divisor, above=0)
        self.quality = quality
        self.divisor = divisor

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        sizes = [len(encode(image, "JPEG", quality=self.quality)) for image in to_pil(images, self.name)]
        return torch.tensor(sizes, dtype=torch.float32) / (-1000 * self.divisor)
