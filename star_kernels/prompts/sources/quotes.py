"""Core content from quoted text: the text that is to be written in the image.

Recognised are straight quotes ("..." and '...'), typographic quotes, and those of LaTeX (``...''). Of nested quotes the
outermost pair counts. Doubled marks (''...'', ""..."") and escaped marks (\\"...\\") are quotes as well. If the
matching mark is missing, another kind of double (or single) quote may close the text.

A mark without a partner is not a quotation, nor is a straight double quote that is followed by another opening one. A
straight double quote right after a digit does not open a quotation (it means inches). A straight single quote does not
open one after a letter or digit and does not close one before a letter or digit (it is an apostrophe: "the farmer's
stall", "the kids' menu"), and it does not open one before a decade or an elision ("'90s", "'n'").
"""

from __future__ import annotations

import re
from typing import NamedTuple

from star_kernels.prompts.core import Core, Span, check_prompt, core_of
from star_kernels.prompts.sources.words import is_letter

_CLOSING = {
    '"': '"',
    "'": "'",
    "`": "`'",  # Markdown, LaTeX
    "\u00b4": "\u00b4",
    "\uff02": "\uff02",  # full width
    "\uff07": "\uff07",
    "\u201c": "\u201d",  # English
    "\u201d": "\u201d",  # Finnish, Swedish
    "\u201e": "\u201c\u201d",  # German, Polish
    "\u201f": "\u201d",
    "\u2018": "\u2019",  # English
    "\u201a": "\u2018\u2019",  # German
    "\u201b": "\u2019",
    "\u00ab": "\u00bb",  # French, Russian
    "\u00bb": "\u00ab",  # German, Danish
    "\u2039": "\u203a",  # the same, nested
    "\u203a": "\u2039",
    "\u300c": "\u300d",  # Chinese, Japanese
    "\u300e": "\u300f",  # the same, nested
    "\uff62": "\uff63",  # half width
}
_DOUBLED = {'"': '"', "'": "'", "`": "`'"}  # marks that may be written twice or more
_DOUBLE = frozenset('"\u201c\u201d\u201e\u201f\uff02')
_SINGLE = frozenset("'`\u00b4\u2018\u2019\u201a\u201b\uff07")
_STRAIGHT = frozenset("'`\u00b4\uff07")  # single marks that both open and close
_NOT_AFTER_LETTER = frozenset("\u201d\u00bb\u203a")  # closing marks in most languages
_NO_OPENING = re.compile(r"['`\u00b4\uff07](?:\d0s|n|til|tis|twas|em)\b", re.IGNORECASE)
_MARK = re.compile(rf"(\\*)([{''.join({*_CLOSING, *''.join(_CLOSING.values())})}])")


class _Mark(NamedTuple):
    """A quotation mark and the backslashes before it."""

    sign: str
    start: int
    stop: int
    escapes: int


def quoted_text(prompt: str) -> Core:
    """The quoted texts in a prompt, each a phrase, without the quotes and the whitespace inside them.

    Backslashes before quotes within the text are removed from the name of the phrase.
    """
    check_prompt(prompt)
    marks = [_Mark(m[2], m.start(), m.end(), len(m[1])) for m in _MARK.finditer(prompt)]
    found: list[tuple[str, list[Span]]] = []
    first = 0
    while first < len(marks):
        pair = _pair(prompt, marks, first)
        if pair is None:
            first += 1
            continue
        start, stop, first = pair
        content = prompt[start:stop]
        start += len(content) - len(content.lstrip())
        stop = start + len(content.strip())
        if start < stop:
            found.append((_MARK.sub(r"\2", content), [(start, stop)]))
    return core_of(prompt, found)


def _pair(prompt: str, marks: list[_Mark], first: int) -> tuple[int, int, int] | None:
    """The start and stop of the text that a mark opens, and the index of the mark that follows its closing mark."""
    count = _run(marks, first)
    last = marks[first + count - 1]
    if count > 1 and _opens(prompt, marks[first], last.stop) and not prompt[last.stop : last.stop + 1].isspace():
        for at in range(first + count, len(marks) - count + 1):
            close = marks[at]
            ends = close.sign in _DOUBLED.get(last.sign, "") and _ends(prompt, close.start, marks[at + count - 1].stop)
            if _run(marks, at) == count and ends:
                return last.stop, close.start, at + count
    opening = marks[first]
    if not _opens(prompt, opening, opening.stop):
        return None
    for find in (_find_escaped_alike, _find_close, _find_other_kind):
        found = find(prompt, marks, first)
        if found is not None:
            close = marks[found]
            return opening.stop, close.start if opening.escapes else close.stop - 1, found + 1
    return None


def _run(marks: list[_Mark], first: int) -> int:
    """The number of equal adjacent marks, beginning with this one."""
    stop = first + 1
    while stop < len(marks) and marks[stop] == _next(marks[stop - 1]):
        stop += 1
    return stop - first


def _next(mark: _Mark) -> _Mark:
    """The same mark, repeated right after itself."""
    return mark._replace(start=mark.stop, stop=mark.stop + mark.escapes + 1)


def _opens(prompt: str, mark: _Mark, stop: int) -> bool:
    """Whether a mark, or a run of marks up to ``stop``, may open a quotation."""
    before, after = prompt[mark.start - 1 : mark.start], prompt[stop : stop + 1]
    if mark.sign == '"':
        return not before.isdigit()
    if mark.sign in _STRAIGHT:
        unit = prompt[: mark.start].rstrip(mark.sign)[-1:].isdigit()  # feet and inches
        elision = _NO_OPENING.match(prompt, stop - 1)
        return not (unit or (before and is_letter(before)) or after.isspace() or elision)
    if mark.sign in _NOT_AFTER_LETTER:
        return not (before and is_letter(before)) and bool(after) and not after.isspace()
    return mark.sign in _CLOSING


def _find_escaped_alike(prompt: str, marks: list[_Mark], first: int) -> int | None:
    """The closing mark among those with equally many backslashes; pairs of other marks are part of the text."""
    level = marks[first].escapes
    alike = [i for i in range(first, len(marks)) if marks[i].escapes == level]
    if len(alike) == len(marks) - first:
        return _find_close(prompt, marks, first)
    found = _find_close(prompt, [marks[i] for i in alike], 0)
    if found is None:
        return None
    others = [m for m in marks[first : alike[found]] if m.escapes != level and m.sign == marks[first].sign]
    return alike[found] if len(others) % 2 == 0 else None


def _find_close(prompt: str, marks: list[_Mark], first: int) -> int | None:
    sign, depth = marks[first].sign, 0
    for at in range(first + 1, len(marks)):
        mark = marks[at]
        if mark.sign == '"' == sign and not _closes(prompt, mark):
            return None  # another opening
        if mark.sign in _CLOSING[sign] and _closes(prompt, mark):
            if depth == 0:
                return at
            depth -= 1
        elif mark.sign == sign and sign not in _CLOSING[sign]:
            depth += 1
    return None


def _find_other_kind(prompt: str, marks: list[_Mark], first: int) -> int | None:
    """A closing mark of another kind than the opening one, as in \u201cOpen" and \u2018Open'."""
    kind = next((kind for kind in (_DOUBLE, _SINGLE) if marks[first].sign in kind), frozenset[str]())
    for at in range(first + 1, len(marks)):
        if marks[at].sign in kind:
            if _ends(prompt, marks[at].start, marks[at].stop):
                return at
            if kind is _DOUBLE:
                return None  # another opening
    return None


def _closes(prompt: str, mark: _Mark) -> bool:
    if mark.sign in _SINGLE:
        return _ends(prompt, mark.start, mark.stop)
    if mark.sign == '"':
        after = prompt[mark.stop : mark.stop + 1]
        return not (prompt[mark.start - 1].isspace() and after and is_letter(after))
    return True


def _ends(prompt: str, start: int, stop: int) -> bool:
    """Whether the mark from start to stop comes right after a word, and not right before one."""
    after = prompt[stop : stop + 1]
    return not prompt[start - 1].isspace() and not (after and is_letter(after))
