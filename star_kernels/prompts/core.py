"""The core content of a prompt: phrases and their character spans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from star_kernels.prompts.spelling import plain

Span = tuple[int, int]  # characters [start, stop) of a prompt


class Phrase(NamedTuple):
    """A part of the core content that can have its own map."""

    name: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Core:
    """The core content of a prompt.

    Args:
        prompt: the text that the spans refer to.
        phrases: the parts of the core content. If empty, all tokens of the prompt are selected.

    Raises:
        TypeError: prompt is not a string.
        ValueError: a phrase without spans, or a span that is not ``0 <= start < stop <= len(prompt)``.
    """

    prompt: str
    phrases: tuple[Phrase, ...] = ()

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        phrases = tuple(Phrase(name, tuple((start, stop) for start, stop in spans)) for name, spans in self.phrases)
        for name, spans in phrases:
            if not spans:
                raise ValueError(f"phrases must have at least one span each, got none for {name!r}")
            for span in spans:
                check_span(span, self.prompt)
        object.__setattr__(self, "phrases", phrases)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(phrase.name for phrase in self.phrases)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The distinct spans of all phrases, in the order of the prompt."""
        return tuple(sorted({span for phrase in self.phrases for span in phrase.spans}))

    @property
    def words(self) -> tuple[str, ...]:
        """The text at ``spans``."""
        return tuple(self.prompt[start:stop] for start, stop in self.spans)


def core_of(prompt: str, found: Iterable[tuple[str, Iterable[Span]]]) -> Core:
    """A Core from named spans. Names that differ only in spelling or spacing are occurrences of one phrase."""
    names: dict[str, str] = {}
    spans: dict[str, list[Span]] = {}
    for name, occurrences in found:
        key = " ".join(plain(name).split())
        names.setdefault(key, " ".join(name.split()))
        spans.setdefault(key, []).extend(occurrences)
    return Core(prompt, tuple(Phrase(names[key], tuple(dict.fromkeys(spans[key]))) for key in names))


def check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")


def check_span(span: Span, prompt: str) -> None:
    start, stop = span
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in span):
        raise TypeError(f"spans must be pairs of integers, got {span!r}")
    if not 0 <= start < stop <= len(prompt):
        raise ValueError(f"spans must have 0 <= start < stop <= {len(prompt)} (length of the prompt), got {span!r}")
