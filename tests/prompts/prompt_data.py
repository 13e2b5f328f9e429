"""Prompts in the formats of GenEval and of Flow-GRPO's OCR task: examples, and the full files if available."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

NUMBERS = ("", "one", "two", "three", "four")

OBJECTS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "tea kettle", "count": 1}]},
    {"tag": "counting", "include": [{"class": "lynx", "count": 3}], "exclude": [{"class": "lynx", "count": 4}]},
    {"tag": "counting", "include": [{"class": "walrus", "count": 2}], "exclude": [{"class": "walrus", "count": 3}]},
    {"tag": "colors", "include": [{"class": "peach", "count": 1, "color": "peach"}]},
    {"tag": "two_object", "include": [{"class": "fly", "count": 1}, {"class": "butter fly", "count": 1}]},
    {"tag": "two_object", "include": [{"class": "desk lamp", "count": 1}, {"class": "desk", "count": 1}]},
    {
        "tag": "color_attr",
        "include": [{"class": "mug", "count": 1, "color": "red"}, {"class": "mug", "count": 1, "color": "orange"}],
    },
    {
        "tag": "color_attr",
        "include": [{"class": "orange", "count": 1, "color": "blue"}, {"class": "van", "count": 1, "color": "orange"}],
    },
    {
        "tag": "position",
        "include": [{"class": "igloo", "count": 1}, {"class": "lantern", "count": 1, "position": ["left of", 0]}],
    },
    {
        "tag": "position",
        "include": [{"class": "fly", "count": 1}, {"class": "butter fly", "count": 1, "position": ["below", 0]}],
    },
    {
        "tag": "position",
        "include": [{"class": "cart", "count": 1}, {"class": "owl", "count": 1, "position": ["above", 0]}],
    },
]
WRITTEN = (
    'A noodle cart with a paper lantern that says "Broth & Buns", rain on the street, the cook\'s hat steaming.',
    "A tug boat named \"Queen Ada's Luck\" leaves the harbour at 6 o'clock.",
    'A label "N₂O 2½ Litres" on the chemist\u2019s bottle, next to a 5 inch ruler.',
    'The fortune cookie reads "Don\'t Look Back!" and the café\u2019s owner smiles.',
    '"Closed" on a door.',
    'A screen with the words "Load: 3.5%" in it',
)


@cache
def file_lines(name: str) -> tuple[str, ...]:
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("STAR_KERNELS_DATA", default))
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not in STAR_KERNELS_DATA, or ../shared/data beside the repository")
    return tuple(line for line in (folder / name).read_text(encoding="utf-8").split("\n") if line)


def geneval_file() -> list[dict[str, Any]]:
    return [json.loads(line) for line in file_lines("geneval_evaluation_metadata.jsonl")]


def ocr_file() -> list[str]:
    return list(file_lines("ocr_prompts.txt"))


def compose(metadata: dict[str, Any]) -> tuple[str, list[list[tuple[int, int]]]]:
    """A prompt from GenEval's templates, and the spans of its objects and relation."""
    text, spans = "a photo of", []

    def write(*words: str) -> list[tuple[int, int]]:
        nonlocal text
        written = []
        for word in words:
            text += " "
            written.append((len(text), len(text) + len(word)))
            text += word
        return written

    def write_object(item: dict[str, Any]) -> list[tuple[int, int]]:
        if item["count"] > 1:
            return write(NUMBERS[item["count"]], item["class"] + ("es" if item["class"][-1] == "s" else "s"))
        words = [item["color"], item["class"]] if "color" in item else [item["class"]]
        write("an" if words[0][0] in "aeiou" else "a")
        return write(*words)

    include = metadata["include"]
    if metadata["tag"] == "position":
        second = write_object(include[1])
        relation = write(include[1]["position"][0])
        spans = [write_object(include[0]), second, relation]
    else:
        for item in include:
            if spans:
                write("and")
            spans.append(write_object(item))
    return text, spans
