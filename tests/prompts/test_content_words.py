"""Content words in any script."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_kernels.prompts import content_words
from star_kernels.prompts.sources.words import BEFORE_OF, FUNCTION_WORDS, word_spans


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a red bicycle leaning against a yellow wall", ["red bicycle leaning", "yellow wall"]),
        ("A photo of two cats, left of an OLD clock.", ["two cats", "OLD clock"]),
        ("it\u2019s the wizard's hat on top of wi-fi boxes", ["wizard's hat", "wi-fi boxes"]),
        ("a photo on the left side", ["photo", "left side"]),
        ("3.5 tons, 1,000 bees", ["3.5 tons", "1,000 bees"]),
        ("the kids' menu - 5. floor", ["kids", "menu", "5", "floor"]),
        ("the of and", []),
        ("", []),
    ],
)
def test_function_words_and_nouns_before_of_are_not_content_words(prompt: str, phrases: list[str]) -> None:
    assert list(content_words(prompt).names) == phrases


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("一只红色的猫\uff0c坐在长椅上。", ["一只红色的猫", "坐在长椅上"]),
        ("кошка на скамейке", ["кошка", "на", "скамейке"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("แมวสีแดง บนม้านั่ง", ["แมวสีแดง", "บนม้านั่ง"]),
        ("قطة على المقعد", ["قطة", "على", "المقعد"]),
        ("cafe\u0301 na\u00efve", ["cafe\u0301", "na\u00efve"]),
        ("\ufeffbi\u00adcycle \u200fדלת\u200f", ["bi\u00adcycle", "דלת"]),
        ("\uff34\uff28\uff25 owl, don\u02bct", ["owl"]),
        ("🏳️‍🌈flag 👩🏽‍🚀", ["🏳️‍🌈", "flag", "👩🏽‍🚀"]),
    ],
)
def test_words_of_every_script_are_content_words(prompt: str, words: list[str]) -> None:
    assert list(content_words(prompt).words) == words


def test_equal_phrases_are_one_with_all_occurrences() -> None:
    core = content_words("a red owl and a Red  owl")
    assert core.names == ("red owl",)
    assert core.words == ("red", "owl", "Red", "owl")


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_words_are_disjoint_and_cover_all_letters_and_digits(text: str) -> None:
    spans = word_spans(text)
    assert all(start < stop for start, stop in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    outside = "".join(c for i, c in enumerate(text) if not any(a <= i < b for a, b in spans))
    assert not any(c.isalnum() for c in outside)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*sorted(FUNCTION_WORDS)[:40], "owl", "Bench", "rain"]), max_size=12))
def test_content_words_are_the_words_outside_the_list(words: list[str]) -> None:
    kept = [word for word in words if word not in FUNCTION_WORDS]
    assert list(content_words(" ".join(words)).words) == kept


def test_the_word_lists_are_lower_case_and_disjoint() -> None:
    assert all(word == word.casefold() for word in FUNCTION_WORDS | BEFORE_OF)
    assert not FUNCTION_WORDS & BEFORE_OF
