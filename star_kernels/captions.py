"""Text in figures: drawn literally, for any characters, and shortened to the available space."""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from typing import Any

from matplotlib import rcParams
from matplotlib.font_manager import FontProperties, findfont, get_font

LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}  # a dollar sign in a prompt does not begin a formula
_NO_GLYPH = "\u25a1"  # an empty square
_warned = False


def caption(text: str, width: int, lines: int = 4) -> str:
    """Wraps a text to at most ``lines`` lines of ``width`` characters, to be drawn with the options ``LITERAL``.

    Control characters are replaced by spaces. Characters without a glyph in the fonts of ``rcParams["font.family"]``
    are replaced by squares, with a warning for the first one in a process.
    """
    global _warned
    fonts = _fonts()
    drawn, missing = "", list[str]()
    for character in unicodedata.normalize("NFC", text):
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            drawn += " "
        elif character.isascii() or any(font.get_char_index(ord(character)) for font in fonts):
            drawn += character
        elif unicodedata.category(character) not in ("Cf", "Mn"):  # invisible, or a combining mark
            drawn += _NO_GLYPH
            missing.append(character)
    if missing and not _warned:
        _warned = True
        warnings.warn(
            f"no font of figures has a glyph for U+{ord(missing[0]):04X}, which is drawn as {_NO_GLYPH}: "
            "add a font that has it to matplotlib.rcParams['font.family']",
            stacklevel=3,
        )
    return "\n".join(textwrap.wrap(drawn, width, max_lines=lines, placeholder=" \u2026"))


def _fonts() -> list[Any]:
    """The fonts that matplotlib uses, in the order in which it searches them for a glyph."""
    found = []
    for family in rcParams["font.family"]:
        try:
            found.append(get_font(findfont(FontProperties(family=[family]), fallback_to_default=False)))
        except ValueError:  # not installed
            continue
    return found or [get_font(findfont(FontProperties()))]
