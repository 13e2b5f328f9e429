"""Prompt files are read whole, or refused by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from star_trainer.prompts import load_prompts


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('a dog\n\n  a sign that says "open"  \n')
    assert [p.text for p in load_prompts(str(path))] == ["a dog", 'a sign that says "open"']


def test_json_lines_keep_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a bench", "tag": "single_object", "include": [{"class": "bench", "count": 1}]}\n')
    (prompt,) = load_prompts(str(path))
    assert prompt.text == "a bench"
    assert prompt.metadata == {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a b', "line 3, is not JSON"),
        ('{"text": "a b"}', 'line 3, must be an object with a "prompt"'),
        ('{"prompt": " "}', 'line 3, must be an object with a "prompt"'),
        ('["a b"]', 'line 3, must be an object with a "prompt"'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a dog"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(str(path))
    assert str(path) in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.prompts must be a file or one of scenes:composition"):
        load_prompts(str(tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match="scenes:nonsense"):
        load_prompts("scenes:nonsense")
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="has no prompts"):
        load_prompts(str(empty))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_prompts(str(binary))


def test_evaluation_draws_other_scenes() -> None:
    train, held_out = load_prompts("scenes:text"), load_prompts("scenes:text", seed="evaluation")
    assert [p.text for p in train] == [p.text for p in load_prompts("scenes:text")]
    assert [p.text for p in train] != [p.text for p in held_out]
