"""Quoted text: what an image is asked to show in writing.

Straight quotes ("..." and '...') and typographic ones. The outermost pair counts, with whatever quotes stand inside it.
A mark without a partner is no quotation, nor is a straight double one before the next that opens. A straight double
quote right after a digit opens nothing (it means inches). A single one neither opens after a letter or digit nor closes
before one (it is an apostrophe: "the farmer's stall", "the kids' menu"), and does not open before a decade or an
elision ("'90s", "'n'").
"""

from __future__ import annotations

import re

from star_kernels.prompts.core import Core, Span, check_prompt, core_of
from star_kernels.prompts.words import is_letter

_CLOSING = {
    '"': '"',
    "'": "'",
    "\uff02": "\uff02",  # full width
    "\u201c": "\u201d",  # English
    "\u201e": "\u201c\u201d",  # German, Polish
    "\u2018": "\u2019",  # English
    "\u201a": "\u2018\u2019",  # German
    "\u00ab": "\u00bb",  # French, Russian
    "\u2039": "\u203a",  # the same within
    "\u300c": "\u300d",  # Chinese, Japanese
    "\u300e": "\u300f",  # the same within
}
_SINGLE = frozenset("'\u2019\u2018")  # marks that are apostrophes as well
_NO_OPENING = re.compile(r"'(?:\d0s|n|til|tis|twas|em)\b", re.IGNORECASE)


def quoted_text(prompt: str) -> Core:
    """The quoted parts of a prompt, without their quotes and the space around them; each text is one phrase."""
    check_prompt(prompt)
    spans: list[Span] = []
    at = 0
    while at < len(prompt):
        close = _find_close(prompt, at) if _opens(prompt, at) else None
        if close is None:
            at += 1
            continue
        content = prompt[at + 1 : close]
        start = at + 1 + len(content) - len(content.lstrip())
        stop = start + len(content.strip())
        if start < stop:
            spans.append((start, stop))
        at = close + 1
    return core_of(prompt, [(prompt[start:stop], [(start, stop)]) for start, stop in spans])


def _opens(prompt: str, at: int) -> bool:
    mark, before = prompt[at], prompt[at - 1 : at]
    if mark not in _CLOSING:
        return False
    if mark == '"':
        return not before.isdigit()
    if mark == "'":
        after = prompt[at + 1 : at + 2]
        return not (before and is_letter(before)) and not after.isspace() and not _NO_OPENING.match(prompt, at)
    return True


def _find_close(prompt: str, opening: int) -> int | None:
    mark, depth = prompt[opening], 0
    for at in range(opening + 1, len(prompt)):
        if mark == '"' == prompt[at] and not _closes(prompt, at):
            return None  # another opening
        if prompt[at] in _CLOSING[mark] and _closes(prompt, at):
            if depth == 0:
                return at
            depth -= 1
        elif prompt[at] == mark and mark not in _CLOSING[mark]:
            depth += 1
    return None


def _closes(prompt: str, at: int) -> bool:
    before, after = prompt[at - 1], prompt[at + 1 : at + 2]
    begins_word = bool(after) and is_letter(after)
    if prompt[at] in _SINGLE:
        return not before.isspace() and not begins_word
    if prompt[at] == '"':
        return not (before.isspace() and begins_word)
    return True
