"""Detects GenEval's objects with Mask2Former.

GenEval uses the Mask2Former of mmdetection (Swin-S, COCO instances). This is the implementation of transformers, with
mmdetection's input size and post-processing (``maskformer_fusion_head.py``, ``instance_postprocess``): masks and boxes
have the image's size, and the confidence is the class probability times the mean mask probability within the mask.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from star_trainer.rewards.extras import require
from star_trainer.rewards.geneval.rules import Detection
from star_trainer.rewards.images import slices
from star_trainer.rewards.options import check_number, check_path, device_of

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_INSTANCES = 100  # candidates per image, as max_per_image in mmdetection
_COCO_TO_GENEVAL = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "hair dryer": "hair drier",
    "motorbike": "motorcycle",  # the last six: names of Pascal VOC, which some checkpoints have
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


class Mask2Former:
    """Instance segmentation by ``AutoModelForUniversalSegmentation``.

    Args:
        model: name on the Hugging Face hub or a local folder, with weights (safetensors) and image processor. Classes
            are those of its ``id2label``.
        device: where the model runs.
        batch_size: number of images per forward pass.
        resize: shortest and longest edge that images are resized to; None uses the values of the image processor.

    Raises:
        TypeError, ValueError: an option of another type, or out of range.
        ImportError: transformers, scipy or pillow is not installed.
        OSError: the model does not exist.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 8,
        resize: tuple[int, int] | None = (800, 1333),
    ) -> None:
        check_path("detector", model)
        check_number("batch_size", batch_size, at_least=1, whole=True)
        self.device = device_of(device)
        if resize is not None:
            if not isinstance(resize, list | tuple) or len(resize) != 2:
                raise TypeError(f"resize must be a pair of the shortest and the longest edge, or None, got {resize!r}")
            for edge in resize:
                check_number("resize", edge, at_least=1, whole=True)
        transformers = require("transformers", "geneval")
        require("PIL.Image", "geneval")
        require("scipy", "geneval")  # required by the Mask2Former of transformers
        self.batch_size = batch_size
        self._size = None if resize is None else {"shortest_edge": resize[0], "longest_edge": resize[1]}
        self._processor = transformers.AutoImageProcessor.from_pretrained(model)
        self._model = transformers.AutoModelForUniversalSegmentation.from_pretrained(model, use_safetensors=True)
        self._model.to(device=self.device, dtype=torch.float32).eval().requires_grad_(False)
        labels = {int(index): str(label) for index, label in self._model.config.id2label.items()}
        self.classes = [_COCO_TO_GENEVAL.get(labels[i], labels[i]) for i in range(len(labels))]

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image], floors: Sequence[float]) -> list[dict[str, list[Detection]]]:
        """The detections in each image, by class.

        Args:
            images: all of one size, so that none is padded.
            floors: for each image, the minimum confidence (exclusive) of its detections.
        """
        found: list[dict[str, list[Detection]]] = []
        for part in slices(len(images), self.batch_size):
            size = {} if self._size is None else {"size": self._size}
            inputs = self._processor(images=list(images[part]), return_tensors="pt", **size).to(self.device)
            output = self._model(**inputs)
            seen = inputs["pixel_values"].shape[-2:]
            for i, (image, floor) in enumerate(zip(images[part], floors[part], strict=True)):
                masks = interpolate(output.masks_queries_logits[i][None], seen, mode="bilinear")[0]
                found.append(self._named(output.class_queries_logits[i], masks, (image.height, image.width), floor))
        return found

    def _named(
        self, class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], floor: float
    ) -> dict[str, list[Detection]]:
        named: dict[str, list[Detection]] = {}
        for label, detection in instances(class_logits, mask_logits, size, floor):
            named.setdefault(self.classes[label], []).append(detection)
        return named


def instances(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], floor: float
) -> list[tuple[int, Detection]]:
    """The instances of one image, with their labels.

    Args:
        class_logits: ``[Q, C + 1]``; the last column means no object.
        mask_logits: ``[Q, h, w]`` over the image.
        size: height and width of the image, which masks and boxes refer to.
        floor: minimum confidence (exclusive). The class probability is an upper bound of the confidence, so that few
            masks are computed.

    Returns:
        Labels and detections, at most ``MAX_INSTANCES``; a query may have several labels. A box is the bounding box of
        its mask, with exclusive right and bottom edges.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    best, flat = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    found = []
    for probability, index in zip(best.tolist(), flat.tolist(), strict=True):
        if probability <= floor:
            break
        logits = interpolate(mask_logits[index // classes][None, None].float(), size, mode="bilinear")[0, 0]
        mask = logits > 0
        score = probability * float((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        if score <= floor:
            continue
        columns, rows = (mask.any(axis).nonzero().flatten().tolist() for axis in (0, 1))
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
        found.append((index % classes, Detection(box, score, mask.cpu())))
    return found
