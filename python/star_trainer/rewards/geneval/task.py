"""The task of a GenEval prompt: a line of its metadata, parsed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Requirement:
    """An entry of "include".

    Args:
        noun: the class.
        count: required number, at least 1.
        color: one of ``COLORS``, or None.
        relation: one of ``RELATIONS``, or None.
        target: index of the earlier entry that the relation refers to.
    """

    noun: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Task:
    """The objects that an image must contain, and the excluded classes, each with the count that is too many."""

    tag: str
    include: tuple[Requirement, ...]
    exclude: tuple[tuple[str, int], ...] = ()

    @property
    def nouns(self) -> set[str]:
        return {entry.noun for entry in self.include} | {noun for noun, _ in self.exclude}


def read_task(metadata: Mapping[str, Any]) -> Task:
    """A line of GenEval's file: ``{"tag", "include": [{"class", "count", "color", "position"}], "exclude"}``.

    Raises:
        ValueError: another format, no entries, a colour or relation that GenEval does not have, or a position that does
            not refer to an earlier entry.
    """
    include, exclude = _entries(metadata, "include"), _entries(metadata, "exclude")
    if not include and not exclude:
        raise ValueError(f'geneval requires metadata with an "include" or an "exclude" list, got {dict(metadata)!r}')
    return Task(
        str(metadata.get("tag", "")),
        tuple(_requirement(entry, before) for before, entry in enumerate(include)),
        tuple(_noun_and_count(entry) for entry in exclude),
    )


def _entries(metadata: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    entries = metadata.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"metadata must have a list of objects as {key!r}, got {entries!r}")
    return entries


def _requirement(entry: Mapping[str, Any], before: int) -> Requirement:
    noun, count = _noun_and_count(entry)
    color, position = entry.get("color"), entry.get("position")
    if color is not None and color not in COLORS:
        raise ValueError(f'"color" must be one of {", ".join(COLORS)}, got {color!r}')
    if position is None:
        return Requirement(noun, count, color)
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        raise ValueError(f'"position" must be [relation, index], relation one of {RELATIONS}, got {position!r}')
    target = position[1]
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < before:
        raise ValueError(f'"position" must refer to one of the {before} entries before it, got {position!r}')
    return Requirement(noun, count, color, position[0], target)


def _noun_and_count(entry: Mapping[str, Any]) -> tuple[str, int]:
    noun, count = entry.get("class"), entry.get("count")
    if not isinstance(noun, str) or not noun or isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f'an object must have a "class" and a "count" of at least 1, got {dict(entry)!r}')
    return noun, count
