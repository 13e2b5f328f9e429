"""Detects shapes and letters in images by their overlap with stencils.

An image is separated into one coverage mask per colour, with the background estimated from the image. The overlap of a
mask m with a stencil s is ``sum(m s) / (sum(m m) + sum(s s) - sum(m s))``, the intersection over union of soft masks,
within the stencil's box and a margin of one pixel. Detections are the best stencils that do not touch each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from star_trainer.scenes.draw import CANVAS, LETTER, LETTERS, PALETTE, SHAPES, letter_stencil, shape_stencil

THRESHOLD = 0.55  # minimum overlap
MOST = 8  # maximum number of detections per image
_RADII = (3, 5, 7)
_OFF_COLOR = 0.45  # maximum distance of a pixel from the line between background and colour
_COLORS = tuple(PALETTE)
_SIDE = 15  # side of the largest stencil
_LEAST = 4.0  # minimum number of pixels of a colour


@dataclass(frozen=True)
class Detection:
    """A shape (or a letter) with its colour, centre, half-extent in canvas units, and overlap in 0..1."""

    name: str
    color: str
    x: int
    y: int
    radius: int
    score: float


@dataclass(frozen=True)
class _Bank:
    names: tuple[str, ...]
    radii: tuple[int, ...]
    stencils: Tensor  # [225, K], each centred in a box of 15 x 15
    boxes: tuple[tuple[int, int], ...]  # rows and columns of each
    reach: Tensor  # [K, 2]: rows and columns within which a detection suppresses others


def detect_shapes(images: Tensor) -> list[list[Detection]]:
    """The shapes in each image of ``[N, 3, H, W]``, in order of decreasing overlap."""
    return _detect(color_masks(images), _shapes())


def detect_letters(images: Tensor) -> list[list[Detection]]:
    """The letters of any colour in each image of ``[N, 3, H, W]``; ``color`` is empty."""
    return _detect(color_masks(images).sum(dim=1, keepdim=True), _letters())


def color_masks(images: Tensor) -> Tensor:
    """float32 ``[N, colours, 32, 32]``: how much of each pixel each colour covers."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % CANVAS or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be [N, 3, S, S] with S a multiple of {CANVAS}, got {list(images.shape)}")
    small = F.adaptive_avg_pool2d(images.float().clamp(0, 1), CANVAS)
    background = small.flatten(2).median(dim=2).values[:, None, :, None]  # [N, 1, 3, 1]
    colors = torch.tensor(list(PALETTE.values()))[None, :, :, None]  # [1, colours, 3, 1]
    line = colors - background
    offset = small.flatten(2)[:, None] - background  # [N, 1, 3, pixels]
    part = (offset * line).sum(2) / line.square().sum(2)  # [N, colours, pixels]
    distance = (offset - part[:, :, None] * line).square().sum(2).sqrt()
    amount = part.clamp(0, 1) * (1 - distance / _OFF_COLOR).clamp(0, 1)
    best = F.one_hot((part.clamp(0, 1) - distance).argmax(dim=1), len(_COLORS)).movedim(2, 1)
    return (amount * best).unflatten(2, (CANVAS, CANVAS))


def _detect(masks: Tensor, bank: _Bank) -> list[list[Detection]]:
    overlap = _overlap(masks, bank)  # [N, colours, K, 32, 32]
    best, which = overlap.flatten(1, 2).max(dim=1)  # over colours and stencils
    found: list[list[Detection]] = [[] for _ in masks]
    rows = torch.arange(CANVAS)
    for _ in range(MOST):
        score, place = best.flatten(1).max(dim=1)
        if not bool((score >= THRESHOLD).any()):
            break
        kind = which.flatten(1).gather(1, place[:, None])[:, 0]
        y, x = place // CANVAS, place % CANVAS
        stencil = kind % len(bank.names)
        for n in torch.nonzero(score >= THRESHOLD)[:, 0].tolist():
            k, color = int(stencil[n]), _COLORS[int(kind[n]) // len(bank.names)] if masks.shape[1] > 1 else ""
            found[n].append(Detection(bank.names[k], color, int(x[n]), int(y[n]), bank.radii[k], float(score[n])))
        reach = bank.reach[stencil]
        near = ((rows - y[:, None]).abs() <= reach[:, :1])[:, :, None] & ((rows - x[:, None]).abs() <= reach[:, 1:])[
            :, None, :
        ]
        best = best.masked_fill(near, 0.0)
    return found


def _overlap(masks: Tensor, bank: _Bank) -> Tensor:
    """``[N, colours, K, 32, 32]``; almost empty masks are skipped."""
    flat = masks.flatten(0, 1)[:, None]
    result = torch.zeros(len(flat), len(bank.names), CANVAS, CANVAS)
    full = torch.nonzero(flat.sum(dim=(1, 2, 3)) >= _LEAST)[:, 0]
    flat = flat[full]
    patches = F.unfold(flat, _SIDE, padding=_SIDE // 2)  # [M, 225, pixels]
    shared = (patches.mT @ bank.stencils).mT.unflatten(2, (CANVAS, CANVAS))
    sums = {box: _box_sum(flat.square(), box) for box in set(bank.boxes)}
    there = torch.cat([sums[box] for box in bank.boxes], dim=1)
    area = bank.stencils.square().sum(0)[:, None, None]
    result[full] = shared / (there + area - shared)
    return result.unflatten(0, masks.shape[:2])


def _box_sum(values: Tensor, box: tuple[int, int]) -> Tensor:
    """Sums over the box and its margin of one, around each pixel; both sides are odd."""
    rows, columns = box[0] + 2, box[1] + 2
    padding = (rows // 2, columns // 2)
    return F.avg_pool2d(values, (rows, columns), stride=1, padding=padding, divisor_override=1)


@cache
def _shapes() -> _Bank:
    kinds = [(shape, radius) for shape in SHAPES for radius in _RADII]
    stencils = [shape_stencil(*kind) for kind in kinds]
    return _bank([name for name, _ in kinds], [r for _, r in kinds], stencils, [(r + 1, r + 1) for _, r in kinds])


@cache
def _letters() -> _Bank:
    stencils = [letter_stencil(letter) for letter in LETTERS]
    reach = (LETTER[0] // 2 + 1, LETTER[1] - 1)
    return _bank(LETTERS, [LETTER[0] // 2] * len(LETTERS), stencils, [reach] * len(LETTERS))


def _bank(
    names: Sequence[str], radii: Sequence[int], stencils: Sequence[Tensor], reach: Sequence[tuple[int, int]]
) -> _Bank:
    centred = torch.zeros(len(names), _SIDE, _SIDE)
    for place, stencil in zip(centred, stencils, strict=True):
        rows, columns = stencil.shape
        top, left = (_SIDE - rows) // 2, (_SIDE - columns) // 2
        place[top : top + rows, left : left + columns] = stencil
    boxes = tuple((int(s.shape[0]), int(s.shape[1])) for s in stencils)
    return _Bank(tuple(names), tuple(radii), centred.flatten(1).T.contiguous(), boxes, torch.tensor(reach))
