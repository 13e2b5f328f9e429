"""Prompt files, and which prompts an epoch takes."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from star_trainer.scenes import TASKS, sample_scene
from star_trainer.textfile import read_lines

TEXT = (".txt", "")
JSON_LINES = (".jsonl", ".json")
SCENES = "scenes:"
_DRAWN = 4096  # prompts of a scene task


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a reward has to know about it."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    line: int | None = field(default=None, compare=False)  # of its file


def load_prompts(source: str, *, seed: str = "train", setting: str = "data.prompts") -> list[Prompt]:
    """Prompts of a file, or of drawn scenes ("scenes:composition", "scenes:text").

    Args:
        source: a file with a prompt a line (.txt, or no suffix); or of JSON lines (.jsonl, .json), each an object with
            a "prompt", the rest being metadata.
        seed: of drawn scenes; other seeds give other prompts.
        setting: which names the source, for messages.

    Raises:
        ValueError: an unknown task or suffix, or a line that cannot be read; the message names file and line.
        OSError: a file that cannot be read.
    """
    if source.startswith(SCENES):
        task = source.removeprefix(SCENES)
        if task not in TASKS:
            raise ValueError(f"{setting} must be a file or one of {_tasks()}, got {source!r}")
        rng = random.Random(f"{seed} {task}")
        scenes = [sample_scene(rng, task) for _ in range(_DRAWN)]
        return [Prompt(scene.prompt, scene.metadata) for scene in scenes]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{setting} must be a file or one of {_tasks()}, got {source!r}")
    suffix = path.suffix.lower()
    if suffix not in (*TEXT, *JSON_LINES):
        accepted = f".txt or none for a prompt a line, {' or '.join(JSON_LINES)} for a JSON object a line"
        raise ValueError(f"{setting} must be a file with the suffix {accepted}, got {source!r}")
    read = _from_json if suffix in JSON_LINES else _from_text
    prompts = [read(path, number, line) for number, line in read_lines(path)]
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts


def digest(prompts: list[Prompt]) -> str:
    """The same for the same prompts and metadata alone."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(json.dumps([prompt.text, prompt.metadata], sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def choose(prompts: list[Prompt], count: int, epoch: int, seed: int) -> list[Prompt]:
    """The prompts of an epoch: the list is gone through in one random order after another."""
    chosen = []
    for position in range(epoch * count, (epoch + 1) * count):
        lap, place = divmod(position, len(prompts))
        chosen.append(prompts[_order(len(prompts), f"prompts {seed} {lap}")[place]])
    return chosen


@lru_cache(maxsize=4)
def _order(count: int, seed: str) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return tuple(order)


def _from_text(path: Path, number: int, line: str) -> Prompt:
    if line.startswith("{"):
        try:
            _from_json(path, number, line)
        except ValueError:
            pass  # a prompt that begins with a brace
        else:
            raise ValueError(f"{path}, line {number}, is a JSON object: the file's suffix must be .jsonl or .json")
    return Prompt(line, line=number)


def _from_json(path: Path, number: int, line: str) -> Prompt:
    try:
        record = json.loads(
            line, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant, parse_float=_finite
        )
        if "\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        lone = error.object[error.start].encode("unicode-escape").decode()
        raise ValueError(
            f"{path}, line {number}, holds half a surrogate pair, {lone}, which is no character of its own"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}, is not JSON, an object a line: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise ValueError(f'{path}, line {number}, must be an object with a "prompt", got {line[:80]!r}')
    return Prompt(record["prompt"], {key: value for key, value in record.items() if key != "prompt"}, number)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice in an object")
    return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is larger than any number that can be held")
    return value


def _tasks() -> str:
    return ", ".join(SCENES + task for task in TASKS)
