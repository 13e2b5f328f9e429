"""Texts in pictures: drawn literally, with any characters, and shortened to the space that they have."""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from typing import Any

from matplotlib import rcParams
from matplotlib.font_manager import FontProperties, findfont, get_font

LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}  # a dollar sign in a prompt begins no formula
_NO_GLYPH = "\u25a1"  # an empty square
_warned = False


def caption(text: str, width: int, lines: int = 4) -> str:
    """A text wrapped to at most ``lines`` lines of ``width`` characters, to be drawn with ``LITERAL``.

    Control characters become spaces. A character without a glyph in the fonts of ``rcParams["font.family"]`` becomes a
    square, with a warning for the first one in a process.
    """
    global _warned
    fonts = _fonts()
    drawn, missing = "", list[str]()
    for character in unicodedata.normalize("NFC", text):
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            drawn += " "
        elif character.isascii() or any(font.get_char_index(ord(character)) for font in fonts):
            drawn += character
        elif unicodedata.category(character) not in ("Cf", "Mn"):  # these are invisible or join the one before
            drawn += _NO_GLYPH
            missing.append(character)
    if missing and not _warned:
        _warned = True
        warnings.warn(
            f"no font of figures has a glyph for U+{ord(missing[0]):04X}, drawn as {_NO_GLYPH}: "
            "add one that does to matplotlib.rcParams['font.family']",
            stacklevel=3,
        )
    return "\n".join(textwrap.wrap(drawn, width, max_lines=lines, placeholder=" \u2026"))


def _fonts() -> list[Any]:
    """The fonts that matplotlib draws with, in the order in which it looks for a glyph."""
    found = []
    for family in rcParams["font.family"]:
        try:
            found.append(get_font(findfont(FontProperties(family=[family]), fallback_to_default=False)))
        except ValueError:  # not installed
            continue
    return found or [get_font(findfont(FontProperties()))]
