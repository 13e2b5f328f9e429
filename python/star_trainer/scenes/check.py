"""Checks whether an image fulfils its prompt: the exact reward of drawn scenes.

There are two rules for composition prompts. "geneval" is that of GenEval: only what the prompt names counts, and too
many objects only if the prompt has a count, of the counted class. "nothing_else" also asks that nothing else is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from star_trainer.rewards.geneval.task import read_task
from star_trainer.rewards.ocr import edit_distance
from star_trainer.rewards.options import check_flag
from star_trainer.scenes.detect import Detection, detect_letters, detect_shapes
from star_trainer.scenes.draw import CELL, RADII

RULES = ("geneval", "nothing_else")
_CLEAR = 2  # minimum distance between centres for a relation, in units of the canvas
_PARTLY = 0.3  # score of an object with only the right shape or only the right colour
_GOOD = 0.8  # overlap from which on an object has the full score


class Verdicts(NamedTuple):
    """The verdict on each image.

    Attributes:
        graded: share of fulfilled conditions in 0..1, float32 ``[N]``.
        exact: whether all conditions are fulfilled, bool ``[N]``.
        phrases: each phrase's part of ``graded``, float32 ``[N, G]``, padded with NaN. Phrases are those of
            star_kernels.prompts.core_content: the entries of "include", then the relations; or the text. With the rule
            "geneval" their sum is ``graded``; with "nothing_else" the rest, which belongs to no phrase, is the
            condition that there are no other objects.
    """

    graded: Tensor
    exact: Tensor
    phrases: Tensor


class SceneReward:
    """Scores images of drawn scenes with :func:`check`.

    Args:
        strict: the score is 1 if all conditions are fulfilled, else 0, instead of the share of fulfilled conditions.
            Scores of phrases are their parts of the share in both cases.
        rule: "geneval" or "nothing_else", as in :func:`check`.
    """

    name = "scene"

    def __init__(self, *, strict: bool = False, rule: Literal["geneval", "nothing_else"] = "geneval") -> None:
        check_flag("strict", strict)
        check_rule(rule)
        self.strict, self.rule = strict, rule

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.by_phrase(images, prompts, metadata)[0]

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raises ValueError for metadata that is not a drawn scene's."""
        check_metadata(metadata)

    def by_phrase(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, Tensor]:
        verdicts = check(images, metadata, rule=self.rule)
        return verdicts.exact.float() if self.strict else verdicts.graded, verdicts.phrases


def check(
    images: Tensor,
    metadata: Sequence[Mapping[str, Any]],
    *,
    rule: Literal["geneval", "nothing_else"] = "geneval",
) -> Verdicts:
    """Checks images against the metadata of their prompts.

    Composition ("include"): the conditions are the class and colour, count and size of each object, and the relations
    (as in GenEval an offset along one axis, here the larger one). A count is the number of objects with the class and
    colour; further objects of the class, in any colour, are too many. Text ("text"): one minus the edit distance
    between the printed and the target word over the length of the target, as in Flow-GRPO's OCR reward.

    Args:
        images: ``[N, 3, S, S]`` in 0..1, S a multiple of 32.
        metadata: metadata of each image, with "include" or "text".
        rule: "geneval": these conditions are all, and an object without a count, or with the count 1, may be drawn more
            than once. "nothing_else": a further condition is that there are no other objects, and all counts are exact.

    Raises:
        ValueError: another shape or rule, or metadata with neither of these keys.
    """
    check_rule(rule)
    if len(images) != len(metadata):
        raise ValueError(f"metadata must have an entry for each of the {len(images)} images, got {len(metadata)}")
    for entry in metadata:
        check_metadata(entry)
    images = images.cpu()
    words = [n for n, entry in enumerate(metadata) if "text" in entry]
    things = [n for n, entry in enumerate(metadata) if "text" not in entry]
    scores: dict[int, tuple[float, bool, list[float]]] = {}
    if words:
        for n, letters in zip(words, detect_letters(images[words]), strict=True):
            scores[n] = _judge_word(letters, str(metadata[n]["text"]))
    if things:
        for n, shapes in zip(things, detect_shapes(images[things]), strict=True):
            scores[n] = _judge_things(shapes, metadata[n]["include"], alone=rule == "nothing_else")
    graded, exact, phrases = zip(*(scores[n] for n in range(len(images))), strict=True) if scores else ((), (), ())
    table = torch.full((len(images), max(map(len, phrases), default=1)), torch.nan)
    for row, values in zip(table, phrases, strict=True):
        row[: len(values)] = torch.tensor(values)
    return Verdicts(torch.tensor(graded), torch.tensor(exact, dtype=torch.bool), table)


def check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raises ValueError for metadata that :func:`check` does not accept."""
    if not ("text" in metadata or "include" in metadata):
        raise ValueError(f'metadata must have "include" or "text", got {dict(metadata)!r}')
    if "text" in metadata:
        if not str(metadata["text"]):
            raise ValueError('metadata must have a "text" that is not empty, got ""')
        return
    if not read_task(metadata).include:
        raise ValueError(f'metadata must name an object in its "include" list, got {metadata["include"]!r}')
    for entry in metadata["include"]:
        if "size" in entry and entry["size"] not in RADII:
            raise ValueError(f'"size" must be one of {", ".join(RADII)}, got {entry["size"]!r}')


def read_words(letters: Sequence[Detection]) -> list[str]:
    """Joins letters on one line, with the spacing of printed words, to words."""
    words: list[list[Detection]] = []
    for letter in sorted(letters, key=lambda d: d.x):
        for word in words:
            last = word[-1]
            if abs(last.y - letter.y) <= 1 and abs(letter.x - last.x - CELL) <= 2:
                word.append(letter)
                break
        else:
            words.append([letter])
    return ["".join(letter.name for letter in word) for word in words]


def _judge_word(letters: Sequence[Detection], wanted: str) -> tuple[float, bool, list[float]]:
    wanted = wanted.lower()
    distance = min((edit_distance(word, wanted) for word in read_words(letters)), default=len(wanted))
    share = max(0.0, 1 - distance / len(wanted))
    return share, distance == 0, [share]


def _judge_things(
    found: Sequence[Detection], include: Sequence[Mapping[str, Any]], *, alone: bool
) -> tuple[float, bool, list[float]]:
    left = list(found)
    taken: list[list[Detection]] = []
    for entry in include:
        mine = [d for d in left if _fits(d, entry)]
        left = [d for d in left if d not in mine]
        taken.append(mine)
    conditions: list[list[float]] = [[] for _ in include]  # by phrase
    relations: list[float] = []
    total = sum(int(entry["count"]) for entry in include)
    exact = not alone or len(found) == total
    for n, (entry, mine) in enumerate(zip(include, taken, strict=True)):
        count = int(entry["count"])
        conditions[n].append(_found(entry, mine, left))
        if count > 1:
            others = 0 if alone else sum(d.name == entry["class"] for d in left)
            wrong = max(count - len(mine), len(mine) + others - count)
            conditions[n].append(max(0.0, 1 - wrong / count))
            exact &= wrong == 0
        if "size" in entry:
            sized = any(d.radius == RADII[entry["size"]] for d in mine)
            conditions[n].append(float(sized))
            exact &= sized
        if "position" in entry:
            relation, other = entry["position"]
            holds = bool(mine and taken[other]) and _related(relation, mine[0], taken[other][0])
            relations.append(float(holds))
            exact &= holds
        exact &= len(mine) == count if alone else bool(mine)
    rest = [max(0.0, 1 - abs(len(found) - total) / total)] if alone else []  # condition: no other objects
    parts = [*(value for values in conditions for value in values), *relations, *rest]
    phrases = [*map(sum, conditions), *relations]
    return sum(parts) / len(parts), exact, [value / len(parts) for value in phrases]


def _fits(detection: Detection, entry: Mapping[str, Any]) -> bool:
    return detection.name == entry["class"] and detection.color == entry.get("color", detection.color)


def _found(entry: Mapping[str, Any], mine: Sequence[Detection], others: Sequence[Detection]) -> float:
    if mine:
        return min(1.0, max(d.score for d in mine) / _GOOD)
    near = any(d.name == entry["class"] or d.color == entry.get("color") for d in others)
    return _PARTLY if near else 0.0


def _related(relation: str, second: Detection, first: Detection) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along >= _CLEAR and along > abs(across)
