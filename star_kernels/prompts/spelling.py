"""One spelling for texts that look alike."""

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
    ord("\u2044"): "/",  # within a fraction of one character
}
# Invisible characters: soft hyphens, joiners, marks of direction, variation selectors of emoji.
_UNSEEN = "\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
_INVISIBLE = re.compile(f"[{_UNSEEN}]")
_DOTTED = re.compile("i\u0307+")  # from the Turkish capital i


def plain(text: str) -> str:
    """A text without the differences in spelling that a reader ignores.

    Applies Unicode's NFKC and case folding (composed and decomposed accents, full and half width, ligatures, capitals),
    replaces every kind of apostrophe, quote and dash by the one of ASCII, and removes invisible characters. Spaces are
    kept.
    """
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text).translate(_SAME)).casefold()
    return _DOTTED.sub("i", unicodedata.normalize("NFKC", folded).translate(_SAME))


def located(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The plain spelling of a text, and for each of its characters where in the text that comes from."""
    if text.isascii():
        return plain(text), [(i, i + 1) for i in range(len(text))]
    spelled, places, start = "", list[tuple[int, int]](), 0
    for stop in range(1, len(text) + 1):
        if stop < len(text) and _continues(text[stop]):
            continue
        part = plain(text[start:stop])
        spelled += part
        places += [(start, stop)] * len(part)
        start = stop
    return spelled, places


def _continues(character: str) -> bool:
    """Whether a character belongs to the one before it."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"
