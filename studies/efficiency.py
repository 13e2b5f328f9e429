"""The efficiency of allocations along the gradient of plain Flow-GRPO; studies.along measures what it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studies.cosines import jackknife

CLASSES = ("found", "missing")
WHOLE, FIRST = "all trained steps", "first two steps"
# Allocations that use one set of weights for samples with all objects and another for the others.
MIXED = {
    "plain where missing": ("map", "plain"),
    "group mean where missing": ("map", "group mean"),
    "best sample where missing": ("map", "best sample"),
}


@dataclass(frozen=True)
class Estimate:
    """A value with the half-width of its 95 % interval."""

    value: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.half_width:.2f}"


def efficiency(unit: Mapping[str, Any], name: str, kinds: Sequence[str] = CLASSES, part: str = WHOLE) -> Estimate:
    """Progress per length of a step relative to plain Flow-GRPO, from the samples of the given classes."""

    def value(kept: Sequence[int]) -> float:
        return _per_length(unit, name, kinds, kept, part) / _per_length(unit, "plain", kinds, kept, part)

    return _estimate(unit, value)


def gain(unit: Mapping[str, Any], name: str, baseline: str, part: str = WHOLE) -> Estimate:
    """The efficiency of an allocation minus that of another."""

    def value(kept: Sequence[int]) -> float:
        ends = [_per_length(unit, n, CLASSES, kept, part) for n in (name, baseline)]
        return (ends[0] - ends[1]) / _per_length(unit, "plain", CLASSES, kept, part)

    return _estimate(unit, value)


def _estimate(unit: Mapping[str, Any], value: Callable[[Sequence[int]], float]) -> Estimate:
    numbers = range(len(unit["batches"]))
    error = jackknife([value([n for n in numbers if n != left]) for left in numbers])
    return Estimate(value(numbers), 1.96 * error)


def _per_length(unit: Mapping[str, Any], name: str, kinds: Sequence[str], kept: Sequence[int], part: str) -> float:
    chosen = _atoms(name, kinds)
    steps = slice(None) if part == WHOLE else slice(2)
    progress = sum(sum(unit["progress"][atom][kind][n][steps]) for atom, kind in chosen for n in kept) / len(kept)
    atoms = [unit["atoms"].index(f"{atom}, {kind}") for atom, kind in chosen]
    measured = [unit["sizes"][n][part] for n in kept if n < len(unit["sizes"])]
    squares = [sum(products[a][b] for a in atoms for b in atoms) for products in measured]
    return progress / math.sqrt(sum(squares) / len(squares))


def _atoms(name: str, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """The measured allocations of which a mixed one consists, with the class of samples of each."""
    own = dict(zip(CLASSES, MIXED.get(name, (name, name)), strict=True))
    return [(own[kind], kind) for kind in kinds]


def names(unit: Mapping[str, Any]) -> list[str]:
    """All allocations of a unit, those made of others last."""
    return [*unit["progress"], *MIXED]
