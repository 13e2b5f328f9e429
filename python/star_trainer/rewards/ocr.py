"""Text rendering: compares the text that OCR reads in the image with the target text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from star_kernels.prompts import quoted_text
from star_kernels.prompts.spelling import plain
from star_trainer.rewards.base import Metadata
from star_trainer.rewards.extras import require
from star_trainer.rewards.images import to_uint8
from star_trainer.rewards.options import check_flag, check_number


class Ocr:
    """``1 - distance / length`` of the target text, 0..1: Flow-GRPO's reward (``flow_grpo/ocr.py``), with RapidOCR.

    Texts are normalised before they are compared (:func:`star_kernels.prompts.spelling.plain`), so that different kinds
    of apostrophes and encodings of accents are not errors. Flow-GRPO uses PaddleOCR 2 without its classifier of text
    orientation; RapidOCR runs models of the same family, which are part of its package, on the CPU. Both ignore lines
    with a confidence below one half.

    Args:
        normalize: False compares texts as Flow-GRPO does; see :func:`text_score`.
        threads: number of threads of onnxruntime; None uses all cores.
        params: settings of RapidOCR by dotted name, for example ``{"Global.text_score": 0.3}``.

    Raises:
        TypeError, ValueError: an option of another type or out of range, or an unknown setting of RapidOCR.
        ImportError: rapidocr or onnxruntime is not installed.
    """

    name = "ocr"

    def __init__(
        self, *, normalize: bool = True, threads: int | None = None, params: Mapping[str, Any] | None = None
    ) -> None:
        check_flag("normalize", normalize)
        if threads is not None:
            check_number("threads", threads, at_least=1, whole=True)
        if params is not None and not (isinstance(params, Mapping) and all(isinstance(name, str) for name in params)):
            raise TypeError(f"params must be a mapping of settings, got {params!r}")
        self.normalize = normalize
        rapidocr = require("rapidocr", self.name)
        require("onnxruntime", self.name)
        settings = {
            "Global.use_cls": False,
            "Global.log_level": "error",  # it warns about each image without text
            "EngineConfig.onnxruntime.intra_op_num_threads": -1 if threads is None else threads,
        }
        self._reader = rapidocr.RapidOCR(params={**settings, **(params or {})})

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        targets = [target_text(prompt, record) for prompt, record in zip(prompts, metadata, strict=True)]
        read = [self.read(image) for image in images]
        return torch.tensor(
            [text_score(seen, text, normalize=self.normalize) for seen, text in zip(read, targets, strict=True)]
        )

    def check_prompt(self, prompt: str, metadata: Metadata) -> None:
        """Raises ValueError if neither the metadata nor the prompt contains a target text."""
        target_text(prompt, metadata)

    def read(self, image: Tensor) -> str:
        """The lines of text in an image, float ``[3, H, W]`` in 0..1, from top to bottom, joined by spaces."""
        pixels = to_uint8(image[None])[0].flip(-1).contiguous()  # RapidOCR expects BGR
        return " ".join(self._reader(pixels.numpy()).txts or ())


def target_text(prompt: str, metadata: Metadata) -> str:
    """The text that the image should contain: ``metadata["text"]``, else the first quoted text of the prompt.

    Raises:
        ValueError: there is neither, or it is blank.
    """
    text = metadata.get("text")
    if text is None:
        quoted = quoted_text(prompt).names
        if not quoted:
            raise ValueError(f'ocr requires metadata with a "text", or a prompt with a quoted text, got {prompt!r}')
        text = quoted[0]
    if not isinstance(text, str) or not plain(text).strip():
        raise ValueError(f'ocr requires a "text" that is not blank, got {text!r}')
    return text


def text_score(read: str, target: str, *, normalize: bool = True) -> float:
    """Flow-GRPO's score of a recognised text, in 0..1.

    With ``normalize``, both texts are normalised by :func:`star_kernels.prompts.spelling.plain` and white space is
    removed; without, only spaces are removed and capitals lowered, as in Flow-GRPO. The score is 1 if the target text
    is part of the recognised text; else ``max(0, 1 - edit distance / length of the target text)``.

    Raises:
        ValueError: the target text is empty after normalisation.
    """
    if normalize:
        read, target = ("".join(plain(text).split()) for text in (read, target))
    else:
        read, target = (text.replace(" ", "").lower() for text in (read, target))
    if not target:
        raise ValueError("target must contain a visible character, got none")
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """The Levenshtein distance: the least number of insertions, deletions and substitutions from ``a`` to ``b``."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = row
    return previous[-1]
