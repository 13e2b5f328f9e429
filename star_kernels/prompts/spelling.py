"""Texts that look the same: curly and straight quotes, accents composed with their letter (NFC) or not (NFD)."""

from __future__ import annotations

import unicodedata

_QUOTES = str.maketrans(
    {**dict.fromkeys("\u2018\u2019\u201b\u02bc\uff07", "'"), **dict.fromkeys("\u201c\u201d\u201f", '"')}
)


def plain(text: str) -> tuple[str, list[int]]:
    """The text with straight quotes and decomposed accents in canonical order; and for each of its characters, the
    character of the text that it comes from."""
    units: list[tuple[str, int]] = []
    marks: list[tuple[str, int]] = []  # that combine with the last letter
    for at, character in enumerate(text.translate(_QUOTES)):
        for unit in unicodedata.normalize("NFD", character):
            if unicodedata.combining(unit):
                marks.append((unit, at))
            else:
                units += sorted(marks, key=_order)
                marks = []
                units.append((unit, at))
    units += sorted(marks, key=_order)
    return "".join(unit for unit, _ in units), [at for _, at in units]


def _order(mark: tuple[str, int]) -> int:
    return unicodedata.combining(mark[0])
