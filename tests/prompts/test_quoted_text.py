"""Quoted text: marks that quote, and marks that are apostrophes, inches or unpaired."""

from __future__ import annotations

import prompt_data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_kernels.prompts import quoted_text


def between_double_quotes(prompt: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in prompt.split('"')[1::2])


@pytest.mark.parametrize("prompt", prompt_data.WRITTEN)
def test_the_text_between_double_quotes_is_the_core(prompt: str) -> None:
    assert quoted_text(prompt).words == between_double_quotes(prompt)


def test_every_prompt_of_the_file_gives_its_quoted_text() -> None:
    prompts = prompt_data.ocr_file()
    assert len(prompts) in (1017, 1018)  # the last line has no newline, so some tools do not count it
    for prompt in prompts:
        assert quoted_text(prompt).words == between_double_quotes(prompt), prompt


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        ("a sign \u2018Don\u2019t Panic\u2019 and “Mostly Harmless”", ["Don\u2019t Panic", "Mostly Harmless"]),
        ("„Guten Tag“, „Witaj”, \u201aHallo\u2018", ["Guten Tag", "Witaj", "Hallo"]),
        ("«Привет» \u2039oui\u203a", ["Привет", "oui"]),
        ("写着「你好」和『世界』的牌子", ["你好", "世界"]),
        ("a card \uff02全角\uff02", ["全角"]),
        ("says 'Open Late' and 'Closed'.", ["Open Late", "Closed"]),
    ],
)
def test_straight_and_typographic_quotes(prompt: str, quoted: list[str]) -> None:
    assert list(quoted_text(prompt).words) == quoted


@pytest.mark.parametrize(
    "prompt",
    [
        "the farmer's stall and the kids' menu and James' hat at 6 o'clock",
        "the farmer\u2019s stall and the kids\u2019 menu",
        "a '90s rock 'n' roll bar, 'til dawn",
        'a 5" print beside a 7" print',
        'an unclosed "sign',
        "an unopened” sign and an unclosed “one",
        'nothing "" and "  " and \'\' here',
    ],
)
def test_apostrophes_inches_unpaired_marks_and_empty_quotes_are_not_quotations(prompt: str) -> None:
    assert quoted_text(prompt).words == ()


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        ("\"She said 'Hi' twice\"", ["She said 'Hi' twice"]),
        ("'the \"inner\" one'", ['the "inner" one']),
        ("“outer “inner” end”", ["outer “inner” end"]),
        ("«a «b» c» d", ["a «b» c"]),
    ],
)
def test_the_outermost_quotes_are_used(prompt: str, quoted: list[str]) -> None:
    assert list(quoted_text(prompt).words) == quoted


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        ("a sign ''Hello'' and ''Don't''", ["Hello", "Don't"]),
        ("a sign ``Hello'', `you' and `there`", ["Hello", "you", "there"]),
        ('a sign ""Hello"" and """World"""', ["Hello", "World"]),
        ("the kids' ''menu''", ["menu"]),
        ('nothing "" and then "Hello""World"', ["Hello", "World"]),
        ("a 6'2'' man, a 5''x7'' print and a 5'' nail", []),
    ],
)
def test_doubled_marks_are_quotes(prompt: str, quoted: list[str]) -> None:
    assert list(quoted_text(prompt).words) == quoted


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        (r"a sign \"Hello\" and \'World\'", ["Hello", "World"]),
        (r'a sign \\"Hello\\"', ["Hello"]),
        (r"a sign \'\'Hello\'\'", ["Hello"]),
        ("a sign \\“Open\\”", ["Open"]),
        (r'a sign "say \"hi\" now"', ['say "hi" now']),
        (r"a sign 'it\'s late'", ["it's late"]),
        (r"\"She said \\\"Hi\\\" twice\"", ['She said "Hi" twice']),
        (r'a prompt "C:\" beside "D:\"', ["C:\\", "D:\\"]),
        (r"a 5\" print beside a 7\" print, don\'t", []),
    ],
)
def test_backslashes_before_marks_are_not_part_of_the_text(prompt: str, quoted: list[str]) -> None:
    assert list(quoted_text(prompt).names) == quoted


def test_the_span_of_an_escaped_quotation_excludes_its_marks() -> None:
    assert quoted_text(r"a sign \" Hello \" here").spans == ((10, 15),)


@pytest.mark.parametrize(
    ("prompt", "quoted"),
    [
        ('says “Hello", „Hallo" and \u2018oui\'', ["Hello", "Hallo", "oui"]),
        ("says \"World” and 'yes\u2019", ["World", "yes"]),
        ("”Hej” and »Hallo« and \u203adu\u2039 and “Cześć“", ["Hej", "Hallo", "du", "Cześć"]),
        ("«a» and « b » and ｢猫｣", ["a", "b", "猫"]),
        ("an “unclosed one and “two three", []),
    ],
)
def test_marks_of_other_languages_and_of_two_kinds(prompt: str, quoted: list[str]) -> None:
    assert list(quoted_text(prompt).words) == quoted


def test_an_opening_mark_followed_by_another_is_unpaired() -> None:
    assert quoted_text('a sign "Open and a door "Closed" shut').words == ("Closed",)


def test_whitespace_inside_the_quotes_is_stripped() -> None:
    assert quoted_text('a " Wide Sign " here').spans == ((4, 13),)


def test_a_text_quoted_twice_is_one_phrase() -> None:
    core = quoted_text('"Open" left, "OPEN" right, "Shut" below')
    assert core.names == ("Open", "Shut")
    assert core.phrases[0].spans == ((1, 5), (14, 18))


WORDS = st.lists(st.sampled_from(["rain", "o'clock", "the kids'", "5", "wi-fi", "É", "猫"]), min_size=1, max_size=4)
MARKS = st.sampled_from(['""', "“”", "«»", "「」", "''"])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(WORDS, MARKS, WORDS), max_size=4))
def test_text_put_in_quotes_is_found(parts: list[tuple[list[str], str, list[str]]]) -> None:
    prompt, expected = "", []
    for outside, marks, inside in parts:
        text = " ".join(inside)
        if marks == "''" and "'" in text:
            marks = '""'
        prompt += " ".join(outside) + " " + marks[0] + text + marks[1] + ", "
        expected.append(text)
    assert list(quoted_text(prompt).words) == expected
