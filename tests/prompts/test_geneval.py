"""The core content of GenEval prompts: the spans of the words in the metadata."""

from __future__ import annotations

from typing import Any

import prompt_data
import pytest

from star_kernels.prompts import geneval


def check(metadata: dict[str, Any], prompt: str) -> None:
    text, spans = prompt_data.compose(metadata)
    assert text == prompt
    core = geneval(prompt, metadata)
    assert [list(phrase.spans) for phrase in core.phrases] == spans
    assert list(core.names) == [" ".join(text[a:b] for a, b in phrase) for phrase in spans]


@pytest.mark.parametrize("metadata", prompt_data.OBJECTS, ids=lambda m: prompt_data.compose(m)[0])
def test_every_template_gives_its_objects_and_relation(metadata: dict[str, Any]) -> None:
    check(metadata, prompt_data.compose(metadata)[0])


def test_every_prompt_of_the_file_gives_its_objects_and_relation() -> None:
    lines = prompt_data.geneval_file()
    assert len(lines) == 553
    for line in lines:
        check(line, line["prompt"])


@pytest.mark.parametrize(
    ("prompt", "item", "name"),
    [
        ("three mice on a table", {"class": "mouse", "count": 3}, "three mice"),
        ("2 Knives", {"class": "knife", "count": 2}, "2 Knives"),
        ("a shelf with four teddies", {"class": "teddy", "count": 4}, "four teddies"),
        ("twenty buses", {"class": "bus", "count": 20}, "twenty buses"),
        ("30 sheep", {"class": "sheep", "count": 30}, "30 sheep"),
        ("a bench, painted RED", {"class": "bench", "color": "red"}, "RED bench"),
    ],
)
def test_other_plurals_numbers_and_orders_are_found(prompt: str, item: dict[str, Any], name: str) -> None:
    assert geneval(prompt, {"include": [item]}).names == (name,)


def test_each_word_belongs_to_one_object() -> None:
    metadata = {"include": [{"class": "orange"}, {"class": "van", "color": "orange"}]}
    assert [phrase.spans for phrase in geneval("an orange van, an orange", metadata).phrases] == [
        ((18, 24),),
        ((3, 9), (10, 13)),
    ]
    metadata = {"include": [{"class": "van", "color": "red"}, {"class": "bus", "color": "red"}]}
    assert geneval("a van, red, and a bus, also red", metadata).spans == ((2, 5), (7, 10), (18, 21), (28, 31))


def test_a_singular_and_a_plural_of_one_class_are_distinguished() -> None:
    include = [{"class": "bench", "count": 1}, {"class": "bench", "count": 2, "position": ["right of", 0]}]
    core = geneval("two benches right of a bench", {"include": include})
    assert core.names == ("bench", "two benches", "right of")
    assert core.phrases[0].spans == ((23, 28),)


def test_words_are_found_in_other_spellings() -> None:
    metadata = {"include": [{"class": "café", "count": 1, "color": "rosé"}, {"class": "chef's knife", "count": 2}]}
    prompt = "a photo of a rose\u0301 cafe\u0301 and two chef\u2019s knives"
    assert geneval(prompt, metadata).names == ("rose\u0301 cafe\u0301", "two chef\u2019s knives")


def test_excluded_objects_are_not_core_content() -> None:
    metadata = {"include": [{"class": "owl", "count": 1}], "exclude": [{"class": "barn", "count": 1}]}
    assert geneval("an owl in a barn", metadata).words == ("owl",)


@pytest.mark.parametrize(
    ("item", "missing"),
    [
        ({"class": "cat", "count": 1}, "'cat'"),
        ({"class": "owl", "count": 1, "color": "red"}, "'red' for 'owl'"),
        ({"class": "owl", "count": 3}, "'3' for 'owl'"),
        ({"class": "owl", "count": 1, "position": ["left of", 0]}, "'left of' for 'owl'"),
    ],
)
def test_a_word_that_the_prompt_lacks_is_named(item: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValueError, match=f"metadata must match the prompt, got {missing}"):
        geneval("an owl in a barn of concatenated planks", {"include": [item]})


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        (None, TypeError, "metadata must be a mapping .* got NoneType"),
        ({}, ValueError, 'metadata must have an "include" list .* got None'),
        ({"include": ["owl"]}, ValueError, "include"),
        ({"include": [{"count": 1}]}, ValueError, "metadata must describe an object"),
        ({"include": [{"class": "owl", "count": 0}]}, ValueError, "'count': 0"),
        ({"include": [{"class": "owl", "color": 3}]}, ValueError, "'color': 3"),
        ({"include": [{"class": "owl", "position": []}]}, ValueError, "position"),
        ({"include": [{"class": "owl", "position": "left of"}]}, ValueError, "'position': 'left of'"),
        ({"include": [{"class": "owl", "position": ["", 0]}]}, ValueError, "'position': \\['', 0]"),
        ({"include": [{"class": "owl", "position": {"left of": 0}}]}, ValueError, "'position': {"),
        ({"include": [{"class": "\u200b", "count": 1}]}, ValueError, "'class'"),
        ({"include": [{"class": "owl", "count": True}]}, ValueError, "'count': True"),
    ],
)
def test_other_metadata_is_an_error(metadata: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        geneval("an owl", metadata)
