"""core_content: given phrases, a function of the user, and the choice of the source."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_kernels.prompts import Core, Phrase, core_content, phrases

PROMPT = 'A red bench and a RED  bench under a sign "Redbench", by a wi-fi mast'


def test_every_occurrence_of_a_phrase_is_found_as_whole_words() -> None:
    core = phrases(PROMPT, ["red bench", "wi-fi"])
    assert core.names == ("red bench", "wi-fi")
    assert core.words == ("red bench", "RED  bench", "wi-fi")


def test_scripts_without_spaces_have_no_word_boundaries() -> None:
    assert phrases("一只红色的猫坐在长椅上", ["猫", "长椅"]).spans == ((5, 6), (8, 10))
    assert phrases("고양이가 의자에", ["고양이"]).spans == ((0, 3),)


def test_a_letter_is_not_separated_from_its_combining_mark() -> None:
    with pytest.raises(ValueError, match="got 'cafe' for"):
        phrases("a cafe\u0301", ["cafe"])
    with pytest.raises(ValueError, match="got 'ส' for"):
        phrases("แมวสีแดง", ["ส"])


SPELLINGS = {
    "a straight quote for a curly one": ("the dog\u2019s \u201cbig\u201d bowl", 'dog\'s "big" bowl', (4, 20)),
    "a curly quote for a straight one": ("the dog's bowl", "dog\u2019s", (4, 9)),
    "a modifier letter": ("the dog\u02bcs bowl", "dog's", (4, 9)),
    "NFD for NFC": ("a red caf\u00e9 here", "cafe\u0301", (6, 10)),
    "NFC for NFD": ("a red cafe\u0301 here", "caf\u00e9", (6, 11)),
    "marks in another order": ("a\u0323\u0302 b", "\u1ead", (0, 3)),
    "marks in no canonical order": ("a\u0302\u0323 b", "\u1ead", (0, 3)),
    "Hangul in letters": ("\u1112\u1161\u11ab\u1100\u1173\u11af", "\ud55c\uae00", (0, 6)),
    "Hangul in syllables": ("\ud55c\uae00", "\u1112\u1161\u11ab", (0, 1)),
    "kana": ("\u304c\u306a", "\u304b\u3099", (0, 1)),
}


@pytest.mark.parametrize(("prompt", "phrase", "span"), SPELLINGS.values(), ids=SPELLINGS)
def test_a_phrase_is_found_with_other_quotes_and_normal_forms(prompt: str, phrase: str, span: tuple[int, int]) -> None:
    core = phrases(prompt, [phrase])
    assert core.spans == (span,)
    assert core.names == (phrase,)


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [
        ("a caf\u00e9", "cafe"),
        ("\u304c\u306a", "\u304b"),  # a kana without its voicing mark
        ("\u304b\u3099\u306a", "\u304b"),
        ("\ud55c", "\ud558"),  # a Hangul syllable without its last letter
        ("\u1112\u1161\u11ab", "\ud558"),
    ],
)
def test_a_part_of_a_character_is_not_a_phrase(prompt: str, phrase: str) -> None:
    with pytest.raises(ValueError, match="must occur in the prompt"):
        phrases(prompt, [phrase])


def test_spellings_of_one_name_are_one_phrase() -> None:
    core = phrases("the dog\u2019s bowl and the dog's caf\u00e9", ["dog\u2019s", "dog's", "cafe\u0301", "caf\u00e9"])
    assert core.names == ("dog\u2019s", "cafe\u0301")
    assert core.words == ("dog\u2019s", "dog's", "caf\u00e9")


def test_a_phrase_is_matched_literally() -> None:
    assert phrases("a (red) r.d owl", ["(red)", "r.d"]).words == ("(red)", "r.d")


@pytest.mark.parametrize("absent", ["bench red", "ench", "green"])
def test_an_absent_phrase_is_named(absent: str) -> None:
    with pytest.raises(ValueError, match=f"phrases must occur in the prompt, got '{absent}'"):
        phrases(PROMPT, ["red bench", absent])


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_phrase_is_an_error(blank: str) -> None:
    with pytest.raises(ValueError, match="blank"):
        phrases(PROMPT, [blank])


@pytest.mark.parametrize("wanted", ["red bench", [3], None])
def test_phrases_must_be_a_list_of_strings(wanted: Any) -> None:
    with pytest.raises(TypeError, match="phrases must be a list of strings"):
        phrases(PROMPT, wanted)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["owl", "owls", "red", "é"]), min_size=1, max_size=10), st.data())
def test_the_spans_of_a_phrase_are_its_words(words: list[str], data: st.DataObject) -> None:
    length = data.draw(st.integers(1, len(words)))
    first = data.draw(st.integers(0, len(words) - length))
    wanted = words[first : first + length]
    expected, at = [], 0
    while at + length <= len(words):
        found = words[at : at + length] == wanted
        if found:
            start = len("".join(word + "  " for word in words[:at]))
            expected.append((start, start + len("  ".join(wanted))))
        at += length if found else 1
    assert list(phrases("  ".join(words), [" ".join(wanted).upper()]).spans) == expected


def test_auto_prefers_metadata_then_quotes_then_content_words() -> None:
    metadata = {"include": [{"class": "bench", "count": 1}]}
    assert core_content(PROMPT, metadata=metadata).words == ("bench",)
    assert core_content(PROMPT, metadata={}).words == ("Redbench",)
    assert core_content(PROMPT).words == ("Redbench",)
    assert core_content("a red bench").words == ("red", "bench")


def test_each_source_has_a_name() -> None:
    metadata = {"include": [{"class": "bench", "count": 1}]}
    assert core_content(PROMPT, "quoted").words == ("Redbench",)
    assert core_content("a red bench", "quoted").phrases == ()
    assert "mast" in core_content(PROMPT, "words").words
    assert core_content(PROMPT, "geneval", metadata=metadata).words == ("bench",)
    assert core_content(PROMPT, ["mast"]).words == ("mast",)


def test_a_function_returns_phrases_spans_or_a_core() -> None:
    assert core_content(PROMPT, lambda prompt: ["mast", (2, 5)]).names == ("mast", "red")
    assert core_content(PROMPT, lambda prompt: iter([])).phrases == ()
    core = Core(PROMPT, (Phrase("bench", ((6, 11),)),))
    assert core_content(PROMPT, lambda prompt: core) is core


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ("mast", TypeError, "source must return a list"),
        (None, TypeError, "source must return a list"),
        ([3], TypeError, "got a list with 3"),
        ([(1, 2, 3)], TypeError, r"got a list with \(1, 2, 3\)"),
        (["green"], ValueError, "got 'green' for"),
        ([(5, 5)], ValueError, r"0 <= start < stop <= \d+.*got \(5, 5\)"),
        ([(-1, 5)], ValueError, "0 <= start"),
        ([(0, 5000)], ValueError, "0 <= start"),
        ([(0.0, 5)], TypeError, "pairs of integers"),
        (Core("another"), ValueError, "got that of 'another'"),
    ],
)
def test_a_function_that_returns_anything_else_is_an_error(result: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        core_content(PROMPT, lambda prompt: result)


def test_unknown_sources_and_missing_metadata_are_errors() -> None:
    with pytest.raises(ValueError, match=r"source must be one of auto, quoted, words, geneval.* got 'nouns'"):
        core_content(PROMPT, "nouns")
    with pytest.raises(ValueError, match="metadata must be given"):
        core_content(PROMPT, "geneval")
    nothing: Any = None
    with pytest.raises(TypeError, match="prompt must be a string, got NoneType"):
        core_content(nothing)


def test_a_core_is_validated_and_frozen() -> None:
    core = Core("a red owl", (Phrase("owl", ((6, 9),)), Phrase("red owl", ((2, 5), (6, 9)))))
    assert core.words == ("red", "owl")
    assert hash(core) == hash(Core("a red owl", core.phrases))
    changed: Any = core
    with pytest.raises(AttributeError):
        changed.prompt = "x"
    with pytest.raises(ValueError, match="got none for 'owl'"):
        Core("a red owl", (Phrase("owl", ()),))
    with pytest.raises(ValueError, match=r"got \(6, 10\)"):
        Core("a red owl", (Phrase("owl", ((6, 10),)),))


@pytest.mark.parametrize(
    ("prompt", "wanted", "found"),
    [
        ("a cafe\u0301 by the sea", "Café", "cafe\u0301"),
        ("a café by the sea", "cafe\u0301", "café"),
        ("the wizard\u2019s hat", "wizard's hat", "wizard\u2019s hat"),
        ("the wizard's hat", "wizard\u2019s hat", "wizard's hat"),
        ("a wi\u2011fi box", "wi-fi", "wi\u2011fi"),
        ("\uff4f\uff50\uff45\uff4e door", "open", "\uff4f\uff50\uff45\uff4e"),
        ("a bi\u00adcycle", "bicycle", "bi\u00adcycle"),
        ("the ﬁre", "fire", "ﬁre"),
        ("\u200fק\u05d8ה אדומה\u200f", "קטה", "קטה"),
    ],
)
def test_a_phrase_is_found_in_other_spellings(prompt: str, wanted: str, found: str) -> None:
    assert core_content(prompt, [wanted]).words == (found,)


@pytest.mark.parametrize(("prompt", "wanted"), [("a ﬁx", "ix"), ("a café", "cafe"), ("a cat", "\u200b"), ("", "a")])
def test_phrases_of_parts_of_characters_or_without_characters_are_errors(prompt: str, wanted: str) -> None:
    with pytest.raises(ValueError, match="phrases must"):
        core_content(prompt, [wanted])


def test_two_spellings_are_one_phrase() -> None:
    assert len(core_content("“café” and “cafe\u0301”").phrases) == 1


@pytest.mark.parametrize("prompt", ["", " ", "\u200b", "\u200f\u202c", "\ufeff", "\x00", "...", '""'])
def test_a_prompt_without_a_word_has_an_empty_core(prompt: str) -> None:
    for source in ("auto", "words", "quoted"):
        assert core_content(prompt, source).phrases == ()
