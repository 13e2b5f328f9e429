"""Images of scenes: anti-aliased shapes and 5x7 letters on a canvas of 32 units, at any multiple of 32 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CANVAS = 32
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PALETTE = {
    "red": (0.86, 0.12, 0.14),
    "green": (0.10, 0.62, 0.22),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.96, 0.80, 0.10),
    "purple": (0.58, 0.16, 0.68),
    "black": (0.08, 0.08, 0.08),
}
CELL = 8  # units; the board has 4 x 4 cells
RADII = {"small": 3, "large": 7}  # in one cell and in four; a square covers 5 % and 22 % of the canvas
LETTER = (7, 5)  # rows and columns; one letter per cell
_OVERSAMPLING = 8

# Columns of the common 5x7 dot-matrix capitals; the lowest bit is the top row.
_COLUMNS = {
    "a": "7c1211127c",
    "b": "7f49494936",
    "c": "3e41414122",
    "d": "7f4141413e",
    "e": "7f49494941",
    "f": "7f09090901",
    "g": "3e41415173",
    "h": "7f0808087f",
    "i": "00417f4100",
    "j": "2040413f01",
    "k": "7f08142241",
    "l": "7f40404040",
    "m": "7f021c027f",
    "n": "7f0408107f",
    "o": "3e4141413e",
    "p": "7f09090906",
    "q": "3e4151215e",
    "r": "7f09192946",
    "s": "2649494932",
    "t": "03017f0103",
    "u": "3f4040403f",
    "v": "1f2040201f",
    "w": "3f4038403f",
    "x": "6314081463",
    "y": "0304780403",
    "z": "6159494d43",
}
LETTERS = tuple(_COLUMNS)


@dataclass(frozen=True)
class Item:
    """A shape, with its centre and radius in units of the canvas."""

    shape: str
    color: str
    x: int
    y: int
    radius: int


@dataclass(frozen=True)
class Word:
    """A printed word, with the upper left corner of its first letter in units of the canvas."""

    text: str
    color: str
    x: int
    y: int

    @property
    def width(self) -> int:
        return word_width(self.text)


@dataclass(frozen=True)
class Scene:
    """The objects of a scene, with the prompt that describes them and its metadata."""

    prompt: str
    metadata: Mapping[str, Any] = field(hash=False)
    items: tuple[Item, ...]
    word: Word | None
    background: float


def word_width(text: str) -> int:
    return CELL * len(text) - (CELL - LETTER[1])


def draw(scene: Scene, size: int = CANVAS) -> Tensor:
    """float32 ``[3, size, size]`` in 0..1; size is a multiple of 32."""
    image = torch.full((3, size, size), scene.background)
    colors = [item.color for item in scene.items] + ([scene.word.color] if scene.word else [])
    for mask, color in zip(masks(scene, size), colors, strict=True):
        image = torch.lerp(image, torch.tensor(PALETTE[color])[:, None, None], mask)
    return image


def masks(scene: Scene, size: int = CANVAS) -> Tensor:
    """float32 ``[N, size, size]``: how much of each pixel each item covers; the word is last."""
    if size % CANVAS or size < CANVAS:
        raise ValueError(f"size must be a multiple of {CANVAS}, got {size}")
    scale = size // CANVAS
    stencils = [(shape_stencil(i.shape, i.radius, scale), i.y - i.radius, i.x - i.radius) for i in scene.items]
    if scene.word:
        stencils.append((word_stencil(scene.word.text, scale), scene.word.y, scene.word.x))
    covered = torch.zeros(len(stencils), size, size)
    for mask, (stencil, top, left) in zip(covered, stencils, strict=True):
        rows, columns = stencil.shape
        mask[top * scale : top * scale + rows, left * scale : left * scale + columns] = stencil
    return covered


@cache
def shape_stencil(shape: str, radius: int, scale: int = 1) -> Tensor:
    """Coverage of a shape, ``[side, side]`` with ``side = (2 radius + 1) scale``."""
    cells = (2 * radius + 1) * scale
    fine = cells * _OVERSAMPLING
    at = (torch.arange(fine) + 0.5) / fine * 2 - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    r = torch.hypot(x, y)
    inside = {
        "circle": r <= 1,
        "square": (x.abs() <= 0.86) & (y.abs() <= 0.86),
        "triangle": (x.abs() <= (y + 1) / 2) & (y <= 0.9),
        "cross": ((x.abs() <= 0.32) | (y.abs() <= 0.32)) & (r <= 1.05),
        "ring": (r <= 1) & (r >= 0.55),
    }[shape]
    return F.avg_pool2d(inside.float()[None, None], _OVERSAMPLING)[0, 0]


@cache
def letter_stencil(letter: str) -> Tensor:
    """0 and 1 ``[7, 5]``."""
    columns = torch.tensor(list(bytes.fromhex(_COLUMNS[letter])))
    return (columns[None, :] >> torch.arange(LETTER[0])[:, None] & 1).float()


@cache
def word_stencil(text: str, scale: int = 1) -> Tensor:
    """0 and 1 ``[7 scale, width scale]``."""
    gap = torch.zeros(LETTER[0], CELL - LETTER[1])
    parts = [part for letter in text for part in (letter_stencil(letter), gap)][:-1]
    return torch.cat(parts, dim=1).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
