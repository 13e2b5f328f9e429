"""Prompt files are read completely; errors name file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from star_trainer.prompts import load_prompts


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('a dog\n\n  a sign that says "open"  \n')
    assert [p.text for p in load_prompts(str(path))] == ["a dog", 'a sign that says "open"']


def test_prompts_have_the_core_content_of_their_source(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('a sign that says "open"\n')
    for source, names in (("auto", ("open",)), ("quoted", ("open",)), ("words", ("sign", "says", "open"))):
        (prompt,) = load_prompts(str(path), core_source=source)
        assert prompt.core.names == names
        assert prompt.core is prompt.core  # found once


# Characters at which str.splitlines ends a line, but text editors do not.
NO_ENDS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    texts = [f"a dog{mark}and a cat" for mark in NO_ENDS]
    printable = texts[5:]  # JSON takes no other characters as they are
    text.write_bytes("\r\n".join(texts).encode())
    lines.write_bytes("\n".join(f'{{"prompt": "{line}"}}' for line in printable).encode())
    assert [p.text for p in load_prompts(str(text))] == texts
    assert [p.text for p in load_prompts(str(lines))] == printable
    text.write_bytes(b"a dog\ra cat\n")
    with pytest.raises(ValueError, match=r"line 1, contains a carriage return"):
        load_prompts(str(text))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_byte_order_marks_are_removed(tmp_path: Path, name: str) -> None:
    """At the start of the file, and within concatenated files."""
    lines = ["a dog", "a cat"] if name.endswith(".txt") else ['{"prompt": "a dog"}', '{"prompt": "a cat"}']
    path = tmp_path / name
    path.write_text("".join(f"\ufeff{line}\n" for line in lines), encoding="utf-8")
    assert [p.text for p in load_prompts(str(path))] == ["a dog", "a cat"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.JSONL", "p.json", "p.Json", "p.txt", "p.TXT", "p", "v1.2/p"])
def test_the_suffix_determines_the_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"prompt": "a dog"}\n' if "js" in name.lower() else "a dog\n")
    assert [p.text for p in load_prompts(str(path))] == ["a dog"]


@pytest.mark.parametrize("name", ["p.csv", "p.yaml", "p.jsonl.gz", "p.jsonl~", "p.parquet"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a dog\n")
    with pytest.raises(
        ValueError, match=r"data\.eval_prompts must be a file with the suffix \.txt or none .*\.jsonl or"
    ):
        load_prompts(str(tmp_path / name), setting="data.eval_prompts")


def test_json_lines_in_a_text_file_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('{a dog}\n{"prompt": "a dog"}\n')
    with pytest.raises(ValueError, match=r"line 2, is a JSON object: name the file \.jsonl or \.json"):
        load_prompts(str(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_errors_that_name_them(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a dog\n".encode(encoding))
    with pytest.raises(ValueError, match="is not UTF-8 text but looks like UTF-16 or UTF-32: save it as UTF-8"):
        load_prompts(str(path))
    path.write_bytes("a dog\na café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt, line 2, is not UTF-8 text"):
        load_prompts(str(path))


def test_surrogate_pairs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a \\ud83d\\ude00 face"}\n')
    assert [p.text for p in load_prompts(str(path))] == ["a \U0001f600 face"]


def test_json_lines_keep_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a bench", "tag": "single_object", "include": [{"class": "bench", "count": 1}]}\n')
    (prompt,) = load_prompts(str(path))
    assert prompt.text == "a bench"
    assert prompt.metadata == {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a b', "line 3, is not valid JSON"),
        ('{"text": "a b"}', 'line 3, must be an object with a "prompt"'),
        ('{"prompt": " "}', 'line 3, must be an object with a "prompt"'),
        ('["a b"]', 'line 3, must be an object with a "prompt"'),
        ('{"prompt": "a \\ud800 b"}', r"line 3, must not contain half a surrogate pair, got \\ud800"),
        ('{"prompt": "a b", "text": ["\\udc00"]}', r"line 3, must not contain half a surrogate pair, got \\udc00"),
        ('{"prompt": "a b", "prompt": "c"}', "line 3, is not valid JSON.*'prompt' appears twice"),
        (
            '{"prompt": "a b", "include": [{"class": "a", "class": "b"}]}',
            "line 3, is not valid JSON.*'class' appears twice",
        ),
        ('{"prompt": "a b", "weight": NaN}', "line 3, is not valid JSON.*NaN is not a JSON number"),
        ('{"prompt": "a b", "weight": -1e999}', "line 3, is not valid JSON.*-1e999 is too large for a float"),
        (f'{{"prompt": "a b", "n": {"[" * 100_000}', "line 3, is not valid JSON.*recursion"),
    ],
)
def test_an_invalid_line_is_an_error_that_names_it(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a dog"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(str(path))
    assert str(path) in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.prompts must be a file or .* is not a file \(current"):
        load_prompts(str(tmp_path / "absent.txt"))
    with pytest.raises(ValueError, match="scenes:nonsense"):
        load_prompts("scenes:nonsense")
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"a\xff\n")
    with pytest.raises(ValueError, match="has no prompts"):
        load_prompts(str(empty))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_prompts(str(binary))


def test_evaluation_has_other_scenes() -> None:
    train, held_out = load_prompts("scenes:text"), load_prompts("scenes:text", seed="evaluation")
    assert [p.text for p in train] == [p.text for p in load_prompts("scenes:text")]
    assert [p.text for p in train] != [p.text for p in held_out]


def test_benchmarks_read_prompts_in_the_same_way(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from benchmarks.variants.prompt_tokens import PromptError, read_prompts

    path = tmp_path / "prompts.JSONL"
    path.write_bytes('\ufeff{"prompt": "a dog\u2028and a cat"}\r\n'.encode())
    assert read_prompts(path) == ["a dog\u2028and a cat"]
    path.write_bytes("a dog\n".encode("utf-16"))
    with pytest.raises(PromptError, match=r"--prompts: .*save it as UTF-8"):
        read_prompts(path)
