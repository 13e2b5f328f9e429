"""Classifies the colour of an object with CLIP, as GenEval does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from star_trainer.rewards.clip import Clip
from star_trainer.rewards.extras import require
from star_trainer.rewards.geneval.rules import Box, Detection
from star_trainer.rewards.geneval.task import COLORS

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND = "#999"
TEMPLATES = ("a photo of a {color} {noun}", "a photo of a {color}-colored {noun}", "a photo of a {color} object")
_MAX_ASPECT = 8


class ColorClassifier:
    """Zero-shot classification of cut-out objects into GenEval's ten colours.

    The features of a colour are the mean of the normalised features of three texts; an object has the colour with the
    most similar features (``clip_benchmark/metrics/zeroshot_classification.py``, which GenEval calls).

    Args:
        clip: the model; GenEval uses OpenAI's ViT-L/14.
    """

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._directions: dict[str, Tensor] = {}  # class -> [10, width]

    def __call__(self, image: Image, detections: Sequence[Detection], noun: str) -> list[str]:
        """The colour of each detection of the class ``noun``, in order."""
        if not detections:
            return []
        features = self._clip.images([cut_out(image, detection) for detection in detections])
        nearest = (features @ self._directions_of(noun).T).argmax(-1)
        return [COLORS[int(index)] for index in nearest]

    def _directions_of(self, noun: str) -> Tensor:
        if noun not in self._directions:
            texts = [template.format(color=color, noun=noun) for color in COLORS for template in TEMPLATES]
            features = self._clip.texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._directions[noun] = normalize(features.mean(1), dim=-1)
        return self._directions[noun]


def cut_out(image: Image, detection: Detection) -> Image:
    """The crop of an object's box; pixels outside its mask are grey."""
    if detection.mask is not None:
        modules = require("PIL.Image", "geneval")
        stencil = modules.fromarray((detection.mask.to(torch.uint8) * 255).numpy())
        image = modules.composite(image, modules.new("RGB", image.size, BACKGROUND), stencil)
    left, top, right, bottom = middle(detection.box)
    return image.crop((round(left), round(top), round(right), round(bottom)))


def middle(box: Box) -> Box:
    """The box, shortened around its centre to an aspect ratio of at most eight.

    CLIP's processor enlarges the whole crop before it takes the square in the centre: a box one pixel wide would need
    gigabytes.
    """
    left, top, right, bottom = box
    longest = _MAX_ASPECT * max(min(right - left, bottom - top), 1.0)
    across, down = (max(length - longest, 0.0) / 2 for length in (right - left, bottom - top))
    return left + across, top + down, right - across, bottom - down
