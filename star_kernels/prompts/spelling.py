"""A canonical spelling for texts that look alike."""

from __future__ import annotations

import re
import unicodedata

_APOSTROPHES = "`\u00b4\u2018\u2019\u201a\u201b\u02b9\u02bb\u02bc\u02bd\u2032\uff07\u2039\u203a"
_QUOTES = "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\u301d\u301e\u301f\uff02"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
_SAME = {
    **dict.fromkeys(map(ord, _APOSTROPHES), "'"),
    **dict.fromkeys(map(ord, _QUOTES), '"'),
    **dict.fromkeys(map(ord, _DASHES), "-"),
    ord("\u2044"): "/",  # in single-character fractions
}
# Invisible characters: soft hyphens, joiners, direction marks, variation selectors.
_INVISIBLE_CHARACTERS = "\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
_INVISIBLE = re.compile(f"[{_INVISIBLE_CHARACTERS}]")
_DOTTED = re.compile("i\u0307+")  # from the Turkish capital I with a dot


def plain(text: str) -> str:
    """The canonical spelling of a text, in which differences that a reader ignores are removed.

    Applies Unicode's NFKC and case folding (composed and decomposed accents, full and half width, ligatures, capitals),
    replaces all kinds of apostrophes, quotes and dashes by those of ASCII, and removes invisible characters. Spaces are
    kept.
    """
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text).translate(_SAME)).casefold()
    return _DOTTED.sub("i", unicodedata.normalize("NFKC", folded).translate(_SAME))


def located(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The canonical spelling of a text, and for each of its characters the (start, stop) in the text."""
    if text.isascii():
        return plain(text), [(i, i + 1) for i in range(len(text))]
    spelled, spans, start = "", list[tuple[int, int]](), 0
    for stop in range(1, len(text) + 1):
        if stop < len(text) and _continues(text[stop]):
            continue
        part = plain(text[start:stop])
        spelled += part
        spans += [(start, stop)] * len(part)
        start = stop
    return spelled, spans


def _continues(character: str) -> bool:
    """Whether a character combines with the one before it."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"
