"""GenEval's metadata: its published file, and metadata that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from star_trainer.rewards.geneval.rules import Detection, grade, judge
from star_trainer.rewards.geneval.task import RELATIONS, Requirement, read_task

GENEVAL_FILE = Path(__file__).parents[4] / "shared" / "data" / "geneval_evaluation_metadata.jsonl"


def test_an_entry_is_read_completely() -> None:
    line = {
        "tag": "position",
        "include": [
            {"class": "teddy bear", "count": 2, "color": "red"},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
        "exclude": [{"class": "cat", "count": 1}],
        "prompt": "...",
    }
    task = read_task(line)
    assert task.tag == "position"
    assert task.include == (Requirement("teddy bear", 2, "red"), Requirement("dog", 1, None, "left of", 0))
    assert task.exclude == (("cat", 1),)
    assert task.nouns == {"teddy bear", "dog", "cat"}


@pytest.mark.skipif(not GENEVAL_FILE.exists(), reason="GenEval's file is not beside the project")
def test_geneval_file_is_read_and_can_be_fulfilled_line_by_line() -> None:
    lines = [json.loads(line) for line in GENEVAL_FILE.read_text().splitlines()]
    assert len(lines) == 553
    places = {"left of": (0, 50), "right of": (100, 50), "above": (50, 0), "below": (50, 100)}
    assert set(places) == set(RELATIONS)
    for line in lines:
        task = read_task(line)
        assert len(task.include) == len(line["include"])
        seen: dict[str, list[Detection]] = {}
        for entry in task.include:
            x, y = places[entry.relation] if entry.relation else (50, 50)
            box = (float(x), float(y), x + 10.0, y + 10.0)
            seen.setdefault(entry.noun, []).extend([Detection(box, 0.95)] * entry.count)
        wanted = {entry.noun: entry.color or "red" for entry in task.include}
        for decide in (judge, grade):
            verdict = decide(seen, task, lambda found, noun, wanted=wanted: [wanted[noun]] * len(found))
            assert (verdict.correct, verdict.score) == (True, 1.0), line
            assert not decide({}, task, lambda found, noun: []).correct, line


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"text": "HELLO"},
        {"include": []},
        {"include": "dog"},
        {"include": ["dog"]},
        {"include": [{"class": "dog"}]},
        {"include": [{"class": "dog", "count": 0}]},
        {"include": [{"class": "dog", "count": True}]},
        {"include": [{"class": "dog", "count": 1.5}]},
        {"include": [{"class": "", "count": 1}]},
        {"include": [{"count": 1}]},
        {"include": [{"class": "dog", "count": 1, "color": "beige"}]},
        {"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]},
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 1]}]},
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", -1]}]},
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["near", 0]}]},
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": "left of"}]},
        {"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog"}]},
    ],
    ids=str,
)
def test_other_metadata_is_refused(line: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"geneval requires|list of objects|an object must|\"color\"|\"position\""):
        read_task(line)
