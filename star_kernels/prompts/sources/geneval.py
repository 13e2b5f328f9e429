"""The core content of GenEval prompts, from their metadata.

GenEval prompts (Ghosh et al., 2023, arXiv 2310.11513) follow a template: "a photo of" and objects, each with a count or
an article, perhaps a colour, and a class; two objects are joined by "and" or a relation. GenEval forms plurals by
adding "s" or "es" to any word ("benchs", "knifes", "sheeps"); regular plurals are accepted as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from star_kernels.prompts.core import Core, Phrase, Span, check_prompt
from star_kernels.prompts.sources.phrases import occurrences
from star_kernels.prompts.spelling import plain

_NUMBER_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
"""
_NUMBERS = _NUMBER_WORDS.split()
_IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "foot": "feet"}


@dataclass(frozen=True)
class _Object:
    """One entry of "include"."""

    noun: str
    count: int
    color: str | None
    relation: str | None

    def parts(self) -> list[list[str]]:
        """The words for the object in the order of the prompt; for each all accepted forms, the most likely first."""
        counts = [[_NUMBERS[self.count] if self.count < len(_NUMBERS) else str(self.count), str(self.count)]]
        colors = [[self.color]] if self.color else []
        nouns = _forms(self.noun)
        return [*counts, *colors, nouns] if self.count > 1 else [*colors, nouns[::-1]]


def geneval(prompt: str, metadata: Mapping[str, Any]) -> Core:
    """The objects of a GenEval prompt with their counts and colours, then the words of the relations.

    Args:
        prompt: a GenEval prompt, or any other prompt that contains the same words.
        metadata: a line of a GenEval prompt file, whose "include" lists the objects as {"class", "count", "color",
            "position"}. "exclude" (objects that must not be in the image) is ignored.

    Returns:
        A phrase for each object in the order of "include" ("red bench", "two clocks"), then a phrase for each relation
        ("left of").

    Raises:
        TypeError, ValueError: metadata is not in this format, or names a word that the prompt does not contain.
    """
    check_prompt(prompt)
    objects = _read(metadata)
    taken: list[Span] = []
    found: dict[int, list[Span]] = {}
    # Longer names first: "hot dog" before "dog", and "orange bus" before "orange".
    for i in sorted(range(len(objects)), key=lambda i: -len(f"{objects[i].color or ''} {objects[i].noun}")):
        found[i] = _find(prompt, objects[i], taken)
        taken += found[i]
    named = [found[i] for i in range(len(objects))]
    for item in objects:
        if item.relation:
            spans = [_free(prompt, [item.relation], taken, item)]
            taken += spans
            named.append(spans)
    phrases = [Phrase(" ".join(prompt[start:stop] for start, stop in spans), tuple(spans)) for spans in named]
    return Core(prompt, tuple(phrases))


def _find(prompt: str, item: _Object, taken: list[Span]) -> list[Span]:
    """The words of the object next to each other, else the first free occurrence of each."""
    for words in product(*item.parts()):
        for start, stop in occurrences(prompt, " ".join(words)):
            if not _overlaps((start, stop), taken):
                return _split(prompt, start, words)
    spans: list[Span] = []
    for forms in item.parts():
        spans.append(_free(prompt, forms, taken + spans, item))
    return spans


def _split(prompt: str, start: int, words: tuple[str, ...]) -> list[Span]:
    """Spans of consecutive words that begin at ``start``."""
    spans = []
    for word in words:
        span = next(span for span in occurrences(prompt, word) if span[0] >= start)
        spans.append(span)
        start = span[1]
    return spans


def _free(prompt: str, forms: list[str], taken: list[Span], item: _Object) -> Span:
    for form in forms:
        for span in occurrences(prompt, form):
            if not _overlaps(span, taken):
                return span
    name = item.noun if item.noun in forms else forms[-1]
    raise ValueError(f"metadata must match the prompt, got {name!r} for {item.noun!r}, which is not in {prompt!r}")


def _overlaps(span: Span, others: list[Span]) -> bool:
    return any(span[0] < stop and start < span[1] for start, stop in others)


def _forms(noun: str) -> list[str]:
    """The plurals of a class name, including GenEval's, and the name itself."""
    head, last = noun[: noun.rfind(" ") + 1], noun[noun.rfind(" ") + 1 :]
    plurals = [last + "es", last + "s"]
    if last.endswith("y"):
        plurals.append(last[:-1] + "ies")
    if last.endswith(("f", "fe")):
        plurals.append(last.removesuffix("e")[:-1] + "ves")
    if last in _IRREGULAR:
        plurals.append(_IRREGULAR[last])
    return [head + form for form in (*plurals, last)]


def _read(metadata: Mapping[str, Any]) -> list[_Object]:
    if not isinstance(metadata, Mapping):
        raise TypeError(f'metadata must be a mapping with an "include" list, got {type(metadata).__name__}')
    include = metadata.get("include")
    if not isinstance(include, list) or not all(isinstance(entry, Mapping) for entry in include):
        raise ValueError(f'metadata must have an "include" list of objects, got {include!r}')
    return [_read_object(entry) for entry in include]


def _read_object(entry: Mapping[str, Any]) -> _Object:
    noun, count, color = entry.get("class"), entry.get("count", 1), entry.get("color")
    position = entry.get("position")
    good = _is_word(noun) and isinstance(count, int) and not isinstance(count, bool) and count >= 1
    good = good and (color is None or _is_word(color))
    good = good and (position is None or (isinstance(position, list | tuple) and _is_word(next(iter(position), None))))
    if not good:
        raise ValueError(
            'metadata must describe an object by a "class", a "count" of at least 1, and optionally a "color" and a '
            f'"position" [relation, index], got {dict(entry)!r}'
        )
    return _Object(str(noun), count, color, position[0] if position else None)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and bool(plain(value).strip())
