"""Texts that look alike have one plain spelling."""

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
def test_what_looks_alike_is_spelt_alike(texts: tuple[str, ...]) -> None:
    assert len({plain(text) for text in texts}) == 1


@pytest.mark.parametrize(("one", "other"), [("cafe", "café"), ("o", "0"), ("a b", "ab"), ("l", "1"), ("猫", "犬")])
def test_what_differs_for_a_reader_stays_apart(one: str, other: str) -> None:
    assert plain(one) != plain(other)


@given(st.text(max_size=12))
def test_a_plain_text_stays_as_it_is(text: str) -> None:
    assert plain(plain(text)) == plain(text)


@given(st.text(st.sampled_from("aBé\u0301ﬁ½\u00ad\uff2f“가\u1100\u1161\u11a8 "), max_size=8))
def test_each_plain_character_comes_from_where_it_stands(text: str) -> None:
    spelled, places = located(text)
    assert len(spelled) == len(places)
    assert places == sorted(places)
    for start, stop in set(places):
        part = "".join(c for c, place in zip(spelled, places, strict=True) if place == (start, stop))
        assert part == plain(text[start:stop])
