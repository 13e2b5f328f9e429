"""Core content from content words: the words of a prompt in any script, without function words.

A *word* is a run of letters, digits and combining marks, or a run of pictographs (emoji). It includes apostrophes,
hyphens (also soft hyphens) and zero-width joiners between them ("wizard's", "wi-fi"), and points and commas between
digits ("3.5"). In scripts without spaces, everything between two punctuation marks is one word.

A *content word* is a word that is neither an English function word (`FUNCTION_WORDS`: articles, prepositions,
conjunctions, pronouns, auxiliaries) nor one of `BEFORE_OF` before "of" ("a photo of", "left of", "on top of"). Number
words are content words, and so are all words of other languages: there are no lists of function words for them.
"""

from __future__ import annotations

import unicodedata

from star_kernels.prompts.core import Core, Span, check_prompt, core_of
from star_kernels.prompts.spelling import plain

_FUNCTION_WORDS = """
    a an the this that these those there here some any each every all both such other another same own
    and or but nor so yet if then than as while when where which who whom whose what how because though although
    of in on at to by for with from into onto over under above below beneath beside besides behind between among amid
    amidst against near next along alongside across through throughout around about within without inside outside upon
    off up down out toward towards beyond during before after until since per via like
    i me my you your yours he him his she her hers it its itself we us our ours they them their theirs
    is are was were be been being am isn't aren't wasn't weren't has have had having hasn't haven't do does did doing
    don't doesn't didn't can't could couldn't will won't would shall should may might must
    not no very too also just only
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_BEFORE_OF = """
    photo photograph picture image illustration painting drawing sketch rendering render portrait close-up shot view
    left right top bottom front side middle center centre
"""
BEFORE_OF = frozenset(_BEFORE_OF.split())
_JOINERS = frozenset("'\u2019-\u2010\u2011\u00ad\u200c\u200d\u2060\ufeff")
_NUMBER_JOINERS = frozenset(".,")
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_LETTER, _PICTOGRAPH = "letter", "pictograph"


def content_words(prompt: str) -> Core:
    """The content words of a prompt; words separated by whitespace only are one phrase.

    Example:
        "a red bicycle against a yellow wall" gives "red bicycle" and "yellow wall".
    """
    check_prompt(prompt)
    runs: list[list[Span]] = []
    for start, stop in _content_spans(prompt):
        if runs and prompt[runs[-1][-1][1] : start].isspace():
            runs[-1].append((start, stop))
        else:
            runs.append([(start, stop)])
    return core_of(prompt, [(prompt[run[0][0] : run[-1][1]], run) for run in runs])


def word_spans(text: str) -> list[Span]:
    """The spans of the words of a text."""
    spans: list[Span] = []
    start, kind = 0, None
    for i, character in enumerate(text):
        now = _kind(character, kind) or (kind if _joins(text, i, kind) else None)
        if now != kind:
            if kind:
                spans.append((start, i))
            start, kind = i, now
    if kind:
        spans.append((start, len(text)))
    return spans


def is_boundary(text: str, at: int) -> bool:
    """Whether a word may start or end right before the character at index ``at``."""
    if not 0 < at < len(text):
        return True
    left, right = text[at - 1], text[at]
    if unicodedata.category(right)[0] == "M":
        return False
    return not (is_letter(left) and is_letter(right)) or _is_unspaced(left) or _is_unspaced(right)


def is_letter(character: str) -> bool:
    """Whether a character is a letter, a digit or a combining mark."""
    return unicodedata.category(character)[0] in "LNM"


def _content_spans(prompt: str) -> list[Span]:
    spans = word_spans(prompt)
    words = [plain(prompt[start:stop]) for start, stop in spans]
    following = [*words, ""][1:]
    return [
        span
        for span, word, after in zip(spans, words, following, strict=True)
        if not (
            word in FUNCTION_WORDS or word.removesuffix("'s") in FUNCTION_WORDS or (word in BEFORE_OF and after == "of")
        )
    ]


def _kind(character: str, before: str | None) -> str | None:
    category = unicodedata.category(character)
    if category[0] == "M":
        return before or _LETTER
    if category == "So" or "\U0001f3fb" <= character <= "\U0001f3ff":  # skin tones
        return _PICTOGRAPH
    return _LETTER if category[0] in "LN" else None


def _joins(text: str, at: int, kind: str | None) -> bool:
    """Whether a joiner, such as a hyphen, continues a run of the given kind."""
    if kind is None or at + 1 == len(text):
        return False
    if text[at] in _NUMBER_JOINERS:
        return text[at - 1].isdecimal() and text[at + 1].isdecimal()
    return text[at] in _JOINERS and _kind(text[at + 1], None) == kind


def _is_unspaced(character: str) -> bool:
    """Whether a character is of a script without spaces between words, or with particles joined to them."""
    return unicodedata.name(character, "").startswith(_UNSPACED)
