"""Prompts of scenes, their metadata and their vocabulary.

Composition prompts have GenEval's metadata: "include" lists the objects, and an object's "position" is a relation to an
earlier one. Text prompts have the text to be read, as in OCR tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from star_trainer.scenes.draw import PALETTE, RADII, SHAPES

COLORS = tuple(PALETTE)
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3}
TASKS = ("composition", "text")
_LITTLE = ("a", "an", "and", "the", "word", "in")
_PRINTED = """
    ace aim art axe bay bed bee big bow box bus cab cap cat cow cup dog dry eel egg elk elm eye fan fig fir fly
    fog fox gem gum hat hen hop hut ice ink ivy jam jar jet joy keg key kid kit lid log lot map mix mud nut oak
    oil owl pan pie pin pot rug run rye sea ski sky sun tax tea ten tie toy tub urn van vet wax web win yak yam
    zen zip zoo
"""
WORDS = tuple(_PRINTED.split())


@dataclass(frozen=True)
class Thing:
    """The objects of one phrase of a composition prompt: a shape, its colour, count and size."""

    shape: str
    color: str
    count: int = 1
    size: str | None = None

    @property
    def phrase(self) -> str:
        number = next((word for word, n in COUNTS.items() if n == self.count), None)
        start = number or ("an" if (self.size or self.color)[0] in "aeiou" else "a")
        words = [start, *([self.size] if self.size else []), self.color, self.shape]
        return " ".join(words) + (("es" if self.shape == "cross" else "s") if self.count > 1 else "")

    def entry(self, position: tuple[str, int] | None = None) -> dict[str, Any]:
        return {
            "class": self.shape,
            "count": self.count,
            "color": self.color,
            **({"size": self.size} if self.size else {}),
            **({"position": list(position)} if position else {}),
        }


def describe(things: Sequence[Thing], relation: str | None = None) -> tuple[str, dict[str, Any]]:
    """Prompt and metadata of a composition. A relation is that of the second thing to the first."""
    if relation is not None:
        first, second = things
        entries = [first.entry(), second.entry((relation, 0))]
        return f"{second.phrase} {relation} {first.phrase}", {"tag": "position", "include": entries}
    *rest, last = (thing.phrase for thing in things)
    prompt = f"{', '.join(rest)} and {last}" if rest else last
    tag = "counting" if things[0].count > 1 else ("single", "two", "three")[len(things) - 1]
    return prompt, {"tag": tag, "include": [thing.entry() for thing in things]}


def describe_word(text: str, color: str, other: Thing | None = None) -> tuple[str, dict[str, Any]]:
    """Prompt and metadata of a printed word, optionally with a shape that is not part of the metadata."""
    prompt = f'the word "{text}" in {color}'
    return (f"{prompt} and {other.phrase}" if other else prompt), {"tag": "text", "text": text}


def vocabulary() -> list[str]:
    """The words of all prompts, except quoted ones."""
    shapes = [*SHAPES, *(shape + ("es" if shape == "cross" else "s") for shape in SHAPES)]
    relations = [word for relation in RELATIONS for word in relation.split()]
    return list(dict.fromkeys([*shapes, *COLORS, *RADII, *COUNTS, *relations, *_LITTLE]))
