"""Texts that look alike have the same canonical spelling."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from star_kernels.prompts.spelling import located, plain

ALIKE = [
    ("CAFÉ", "cafe\u0301"),
    ("\uff2f\uff30\uff25\uff2e", "open"),
    ("Don't", "Don\u2019t", "DON`T", "don\u02bct", "don\uff07t"),
    ('"Wi-Fi"', "“wi\u2011fi”", "„WI\u2013FI“", "«wi—fi»", '"wi\u2212fi"'),
    ("ﬁne", "FINE", "fi\u00adne", "\ufefffi\u200bne\u200f"),
    ("Straße", "STRASSE"),
    ("İstanbul", "istanbul", "I\u0307stanbul"),
    ("한국어", unicodedata.normalize("NFD", "한국어")),
    ("wait…", "wait..."),
    ("½", "1/2"),
    ("❤\ufe0f", "❤"),
    ("ὈΔΥΣΣΕΎΣ", "ὀδυσσεύς"),
]


@pytest.mark.parametrize("texts", ALIKE, ids=lambda texts: texts[0])
def test_texts_that_look_alike_have_one_spelling(texts: tuple[str, ...]) -> None:
    assert len({plain(text) for text in texts}) == 1


@pytest.mark.parametrize(("one", "other"), [("cafe", "café"), ("o", "0"), ("a b", "ab"), ("l", "1"), ("猫", "犬")])
def test_texts_that_differ_visibly_have_different_spellings(one: str, other: str) -> None:
    assert plain(one) != plain(other)


@given(st.text(max_size=12))
def test_the_canonical_spelling_is_idempotent(text: str) -> None:
    assert plain(plain(text)) == plain(text)


@given(st.text(st.sampled_from("aBé\u0301ﬁ½\u00ad\uff2f“가\u1100\u1161\u11a8 "), max_size=8))
def test_each_canonical_character_has_the_span_it_comes_from(text: str) -> None:
    spelled, spans = located(text)
    assert len(spelled) == len(spans)
    assert spans == sorted(spans)
    for start, stop in set(spans):
        part = "".join(c for c, span in zip(spelled, spans, strict=True) if span == (start, stop))
        assert part == plain(text[start:stop])
