"""Phrases that the user names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from star_kernels.prompts.core import Core, Span, check_prompt, core_of
from star_kernels.prompts.spelling import plain
from star_kernels.prompts.words import is_boundary


def phrases(prompt: str, wanted: Sequence[str]) -> Core:
    """Every occurrence of each wanted phrase, as whole words and whatever the case and the spaces between words.

    Curly and straight quotes are the same, and so are accents in one character with their letter (NFC) or in two (NFD).

    Scripts that set no spaces between words (Chinese, Japanese, Thai, ...) have no word boundaries to respect.

    Raises:
        TypeError: wanted is not a list of strings.
        ValueError: a phrase is blank, or the prompt does not hold it.
    """
    check_prompt(prompt)
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or not all(isinstance(w, str) for w in wanted):
        raise TypeError(f"phrases must be a list of strings, got {wanted!r}")
    return core_of(prompt, [(phrase, _present(prompt, phrase)) for phrase in wanted])


def occurrences(prompt: str, phrase: str) -> list[Span]:
    """Where a phrase stands as whole words."""
    text, origins = plain(prompt)
    pattern = r"\s+".join(map(re.escape, plain(phrase)[0].split()))
    spans = []
    at = 0
    while match := re.compile(pattern, re.IGNORECASE).search(text, at):
        start, stop = match.span()
        whole = all(is_boundary(text, end) and not _composes(text, end) for end in (start, stop))
        if whole:
            own = origins[start:stop]
            spans.append((min(own), max(own) + 1))
        at = stop if whole else start + 1
    return spans


def _composes(text: str, at: int) -> bool:
    """Whether the characters on both sides of a place are parts of one, as those of a Hangul syllable."""
    before, after = text[max(0, at - 2) : at], text[at : at + 1]
    return unicodedata.normalize("NFC", before + after) != unicodedata.normalize("NFC", before) + after


def _present(prompt: str, phrase: str) -> list[Span]:
    if not phrase.strip():
        raise ValueError(f"phrases must not be blank, got {phrase!r}")
    spans = occurrences(prompt, phrase)
    if not spans:
        raise ValueError(f"phrases must stand in the prompt, {phrase!r} does not: {prompt!r}")
    return spans
