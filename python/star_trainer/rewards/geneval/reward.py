"""The GenEval reward: objects, counts, colours and positions, recognised by a detector and CLIP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from star_trainer.rewards.base import Metadata
from star_trainer.rewards.clip import Clip
from star_trainer.rewards.geneval import rules
from star_trainer.rewards.geneval.colors import ColorClassifier
from star_trainer.rewards.geneval.detector import Mask2Former
from star_trainer.rewards.geneval.task import Task, read_task
from star_trainer.rewards.images import to_pil
from star_trainer.rewards.options import check_number, check_path

if TYPE_CHECKING:
    from PIL.Image import Image

SCORES = ("correct", "strict", "graded")


class GenEval:
    """Whether an image fulfils a line of GenEval's metadata.

    Args:
        score: "correct": 1 or 0, GenEval's own verdict (``judge``); "strict": 1 or 0, with exact counts, which
            Flow-GRPO logs as strict accuracy; "graded": the share of fulfilled conditions (``grade``), which Flow-GRPO
            trains on.
        detector: name or folder of a Mask2Former with its image processor.
        clip: name or folder of the CLIP model that classifies colours.
        device: where both models run.
        batch_size: number of images per forward pass of the detector.
        resize: shortest and longest edge of the detector's input; None uses the values of its image processor.
        threshold: objects must have a confidence above it.
        counting_threshold: the same for tasks with the tag "counting".
        max_objects: maximum number of objects of a class.
        max_overlap: see :func:`star_trainer.rewards.geneval.rules.keep`.
        position_threshold: see :func:`star_trainer.rewards.geneval.rules.relations`.

    Raises:
        TypeError, ValueError: an unknown ``score``, or an option of another type or out of range.
        ImportError: transformers, scipy or pillow is not installed.
        OSError: a model does not exist.
    """

    name = "geneval"

    def __init__(
        self,
        *,
        score: Literal["correct", "strict", "graded"] = "correct",
        detector: str | os.PathLike[str] = "facebook/mask2former-swin-small-coco-instance",
        clip: str | os.PathLike[str] = "openai/clip-vit-large-patch14",
        device: str | torch.device = "cpu",
        batch_size: int = 8,
        resize: tuple[int, int] | None = (800, 1333),
        threshold: float = rules.THRESHOLD,
        counting_threshold: float = rules.COUNTING_THRESHOLD,
        max_objects: int = rules.MAX_OBJECTS,
        max_overlap: float = rules.MAX_OVERLAP,
        position_threshold: float = rules.POSITION_THRESHOLD,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        for name, value in (("threshold", threshold), ("counting_threshold", counting_threshold)):
            check_number(name, value, at_least=0, at_most=1)
        check_number("max_objects", max_objects, at_least=1, whole=True)
        for name, value in (("max_overlap", max_overlap), ("position_threshold", position_threshold)):
            check_number(name, value, at_least=0)
        check_path("clip", clip)
        self.score = score
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.max_objects = max_objects
        self.max_overlap = max_overlap
        self.position_threshold = position_threshold
        self._detect = Mask2Former(detector, device=device, batch_size=batch_size, resize=resize)
        self._color = ColorClassifier(Clip(clip, reward=self.name, device=device))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The scores.

        Raises:
            ValueError: metadata that is not in GenEval's format, or a class that the detector does not have.
        """
        verdicts = self.verdicts(images, metadata)
        return torch.tensor([v.score if self.score == "graded" else float(v.correct) for v in verdicts])

    def check_prompt(self, prompt: str, metadata: Metadata) -> None:
        """Raises ValueError as ``__call__`` does."""
        self._task(metadata)

    def verdicts(self, images: Tensor, metadata: Sequence[Metadata]) -> list[rules.Verdict]:
        """The verdict on each image, with reasons. Raises as ``__call__`` does."""
        tasks = [self._task(record) for record in metadata]
        converted = to_pil(images, self.name)
        floors = [self._threshold(task) for task in tasks]
        found = self._detect(converted, floors)
        return [self._verdict(*case) for case in zip(converted, tasks, floors, found, strict=True)]

    def _verdict(
        self, image: Image, task: Task, floor: float, found: dict[str, list[rules.Detection]]
    ) -> rules.Verdict:
        objects = {
            noun: rules.keep(
                found.get(noun, ()), threshold=floor, max_objects=self.max_objects, max_overlap=self.max_overlap
            )
            for noun in task.nouns
        }
        decide = rules.judge if self.score == "correct" else rules.grade
        colors = partial(self._color, image)
        return decide(objects, task, colors, position_threshold=self.position_threshold)

    def _task(self, record: Metadata) -> Task:
        task = read_task(record)
        unknown = sorted(task.nouns - set(self._detect.classes))
        if unknown:
            known = ", ".join(self._detect.classes)
            raise ValueError(f"metadata must name classes of the detector ({known}), got {', '.join(unknown)}")
        return task

    def _threshold(self, task: Task) -> float:
        return self.counting_threshold if task.tag == "counting" else self.threshold
