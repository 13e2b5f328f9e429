"""Core content given by the user as a list of phrases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from star_kernels.prompts.core import Core, Span, check_prompt, core_of
from star_kernels.prompts.sources.words import is_boundary
from star_kernels.prompts.spelling import located, plain


def phrases(prompt: str, wanted: Sequence[str]) -> Core:
    """All occurrences of each wanted phrase in the prompt, as whole words, in any spelling.

    Differences in capitals, in the whitespace between words, in the kind of apostrophes and dashes and in the encoding
    of accents are ignored (:func:`star_kernels.prompts.spelling.plain`). In scripts without spaces between words
    (Chinese, Japanese, Thai, ...) phrases may begin and end at any character.

    Raises:
        TypeError: ``wanted`` is not a list of strings.
        ValueError: a phrase is blank, or the prompt does not contain it.
    """
    check_prompt(prompt)
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or not all(isinstance(w, str) for w in wanted):
        raise TypeError(f"phrases must be a list of strings, got {wanted!r}")
    return core_of(prompt, [(phrase, _present(prompt, phrase)) for phrase in wanted])


def occurrences(prompt: str, phrase: str) -> list[Span]:
    """The spans at which a phrase occurs as whole words."""
    text, places, edges = _located(prompt)
    pattern = _pattern(phrase)
    spans = []
    at = 0
    while match := pattern.search(text, at):
        start, stop = places[match.start()][0], places[match.end() - 1][1]
        whole = edges >= {match.start(), match.end()} and is_boundary(prompt, start) and is_boundary(prompt, stop)
        if whole:
            spans.append((start, stop))
        at = match.end() if whole else match.start() + 1
    return spans


@lru_cache(maxsize=64)  # many phrases are searched in one prompt
def _located(prompt: str) -> tuple[str, list[Span], set[int]]:
    """The canonical spelling of a prompt, the span of each of its characters, and where phrases may begin and end.

    A ligature becomes several characters with one span; a phrase contains all of them or none.
    """
    text, places = located(prompt)
    edges = {0, len(places), *(i for i, (before, after) in enumerate(pairwise(places), 1) if before != after)}
    return text, places, edges


@lru_cache(maxsize=4096)  # GenEval's classes in all forms exceed the cache of re
def _pattern(phrase: str) -> re.Pattern[str]:
    return re.compile(r"\s+".join(map(re.escape, plain(phrase).split())))


def _present(prompt: str, phrase: str) -> list[Span]:
    if not plain(phrase).strip():
        raise ValueError(f"phrases must not be blank, got {phrase!r}")
    spans = occurrences(prompt, phrase)
    if not spans:
        raise ValueError(f"phrases must occur in the prompt, got {phrase!r} for {prompt!r}")
    return spans
