"""GenEval's verdict on an image, from the objects that a detector found in it.

Rules of github.com/djghosh13/geneval, ``evaluation/evaluate_images.py`` (Ghosh et al., 2023, arXiv 2310.11513), and
the graded variant that Flow-GRPO trains on, github.com/yifan123/reward-server, ``reward_server/gen_eval.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from star_trainer.rewards.geneval.task import Requirement, Task

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
MAX_OVERLAP = 1.0
POSITION_THRESHOLD = 0.1

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Detection:
    """An object in an image.

    Args:
        box: left, top, right, bottom in pixels.
        score: the detector's confidence, 0..1.
        mask: bool ``[H, W]`` over the whole image, or None.
    """

    box: Box
    score: float
    mask: Tensor | None = None


Objects = Mapping[str, Sequence[Detection]]  # by class, in order of decreasing confidence
Colors = Callable[[Sequence[Detection], str], list[str]]  # the colours of some detections of a class


@dataclass(frozen=True)
class Verdict:
    """Whether an image fulfils its task.

    Args:
        correct: GenEval's verdict; from :func:`grade`, Flow-GRPO's strict verdict.
        score: 1 or 0; from :func:`grade`, the share of fulfilled conditions.
        reasons: the conditions that are not fulfilled.
    """

    correct: bool
    score: float
    reasons: tuple[str, ...]


def keep(
    found: Iterable[Detection],
    *,
    threshold: float = THRESHOLD,
    max_objects: int = MAX_OBJECTS,
    max_overlap: float = MAX_OVERLAP,
) -> list[Detection]:
    """The detections of one class that are counted, in order of decreasing confidence.

    Args:
        found: in any order.
        threshold: minimum confidence (exclusive).
        max_objects: maximum number of detections.
        max_overlap: of two boxes with at least this intersection over union, the less confident one is removed; 1
            removes none.
    """
    ordered = sorted((d for d in found if d.score > threshold), key=lambda d: -d.score)[:max_objects]
    if max_overlap == 1:
        return ordered
    kept: list[Detection] = []
    for detection in ordered:
        if all(overlap(detection.box, other.box) < max_overlap for other in kept):
            kept.append(detection)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of boxes with inclusive right and bottom edges, as in GenEval."""
    both = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    either = _area(a) + _area(b) - both
    return both / either if either else 0.0


def relations(a: Box, b: Box, *, threshold: float = POSITION_THRESHOLD) -> set[str]:
    """The position of ``a`` relative to ``b``: none, one or two of "left of", "right of", "above", "below".

    Along each axis, the offset between the centres is reduced by ``threshold`` times the sum of both sizes. A relation
    holds if the remainder is more than half the length of the full offset.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    beyond = [math.copysign(max(abs(d) - threshold * s, 0.0), d) for d, s in zip(offset, sizes, strict=True)]
    if all(abs(d) < 1e-3 for d in beyond):
        return set()
    x, y = (d / math.hypot(*offset) for d in beyond)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in held.items() if holds}


def judge(objects: Objects, task: Task, colors: Colors, *, position_threshold: float = POSITION_THRESHOLD) -> Verdict:
    """GenEval's verdict: all included objects are present, at least in the required number, and no excluded ones.

    Colours and positions are checked for the required number of most confident detections. A position holds if each of
    them has the relation to each object of the target entry, and the target entry is fulfilled itself.

    Args:
        objects: the detections that are counted (:func:`keep`), by class.
        task: the conditions.
        colors: classifies the colours of detections; only called if the task specifies a colour.
        position_threshold: see :func:`relations`.
    """
    reasons: list[str] = []
    fulfilled: list[Sequence[Detection] | None] = []
    for entry in task.include:
        found = list(objects.get(entry.noun, ()))[: entry.count]
        problem = None
        if len(found) < entry.count:
            problem = f"expected {entry.noun}>={entry.count}, found {len(found)}"
        elif entry.color is not None:
            seen = colors(found, entry.noun)
            if seen.count(entry.color) < entry.count:
                problem = f"expected {entry.color} {entry.noun}>={entry.count}, found {_listed(seen)}"
        if problem is None and entry.relation is not None:
            problem = _misplaced(found, entry, fulfilled, position_threshold)
        fulfilled.append(found if problem is None else None)
        reasons += [problem] if problem else []
    for noun, count in task.exclude:
        number = len(objects.get(noun, ()))
        if number >= count:
            reasons.append(f"expected {noun}<{count}, found {number}")
    return Verdict(not reasons, float(not reasons), tuple(reasons))


def grade(objects: Objects, task: Task, colors: Colors, *, position_threshold: float = POSITION_THRESHOLD) -> Verdict:
    """Flow-GRPO's reward: the mean of the terms of all entries, with exact counts.

    Each entry has the term ``1 - |required - found| / required`` for its count; it is negative if more than twice the
    required number is found. If the count is correct, a colour has the same term for the number of objects with that
    colour; if the colour is correct as well, a position that holds has the term 1. If the count is wrong, colour and
    position together have the single term 0. Excluded objects have no term.

    As in Flow-GRPO, a position with a fulfilled target entry always has a term 1, in addition to a term 0 if it does
    not hold: two objects that are present in a wrong position score 3/4.

    Args:
        objects, task, colors, position_threshold: as in :func:`judge`.
    """
    reasons: list[str] = []
    terms: list[float] = []
    fulfilled: list[Sequence[Detection] | None] = []
    for entry in task.include:
        found = list(objects.get(entry.noun, ()))
        problem = None
        terms.append(_closeness(entry.count, len(found)))
        if len(found) != entry.count:
            problem = f"expected {entry.noun}=={entry.count}, found {len(found)}"
            terms += [0.0] if entry.color is not None or entry.relation is not None else []
        elif entry.color is not None:
            seen = colors(found, entry.noun)
            terms.append(_closeness(entry.count, seen.count(entry.color)))
            if seen.count(entry.color) != entry.count:
                problem = f"expected {entry.color} {entry.noun}=={entry.count}, found {_listed(seen)}"
        if problem is None and entry.relation is not None:
            problem = _misplaced(found, entry, fulfilled, position_threshold)
            terms += [0.0] if problem else []
            terms += [1.0] if fulfilled[entry.target] is not None else []
        fulfilled.append(found if problem is None else None)
        reasons += [problem] if problem else []
    return Verdict(not reasons, sum(terms) / len(terms) if terms else 0.0, tuple(reasons))


def _misplaced(
    found: Sequence[Detection], entry: Requirement, fulfilled: Sequence[Sequence[Detection] | None], threshold: float
) -> str | None:
    """Why the position of an entry does not hold, or None."""
    targets = fulfilled[entry.target]
    if targets is None:
        return f"no target for {entry.noun} to be {entry.relation}"
    for detection in found:
        for target in targets:
            held = relations(detection.box, target.box, threshold=threshold)
            if entry.relation not in held:
                return f"expected {entry.noun} {entry.relation} target, found {' and '.join(sorted(held)) or 'neither'}"
    return None


def _closeness(asked: int, found: int) -> float:
    return 1 - abs(asked - found) / asked


def _listed(colors: Sequence[str]) -> str:
    return ", ".join(f"{colors.count(color)} {color}" for color in dict.fromkeys(colors))


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0.0) * max(box[3] - box[1] + 1, 0.0)
