"""Prompts: files of them, their core content, and the choice of an epoch's prompts."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from star_kernels.prompts import Core, core_content
from star_kernels.prompts.content import Source
from star_trainer.scenes import TASKS, sample_scene
from star_trainer.textfile import read_lines

TEXT = (".txt", "")
JSON_LINES = (".jsonl", ".json")
SCENES = "scenes:"
_DRAWN = 4096  # number of prompts of a scene task


@dataclass(frozen=True)
class Prompt:
    """A prompt with its core content.

    Attributes:
        text: the prompt.
        metadata: what rewards need to know about it, such as GenEval's "include".
        line: line number in its file; None if it does not come from a file.
        core_source: how its core content is found; see :func:`star_kernels.prompts.core_content`.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    line: int | None = field(default=None, compare=False)
    core_source: Source = field(default="auto", hash=False)

    @cached_property
    def core(self) -> Core:
        """The core content: the phrases that have maps and that rewards score.

        Raises:
            ValueError: the core source needs metadata that is missing or does not fit the prompt.
        """
        return core_content(self.text, self.core_source, metadata=self.metadata)


def load_prompts(
    source: str, *, seed: str = "train", setting: str = "data.prompts", core_source: Source = "auto"
) -> list[Prompt]:
    """The prompts of a file or of random scenes.

    Args:
        source: a text file with one prompt per line (.txt, or no suffix); a file of JSON lines (.jsonl, .json), each an
            object with a "prompt", whose other keys are metadata; "scenes:composition" or "scenes:text".
        seed: seed of random scenes.
        setting: name of the setting, for error messages.
        core_source: ``allocation.source``, for the prompts' core content.

    Raises:
        ValueError: an unknown task or suffix, or a malformed line; the message names the file and the line.
        OSError: the file cannot be read.
    """
    if source.startswith(SCENES):
        task = source.removeprefix(SCENES)
        if task not in TASKS:
            raise ValueError(f"{setting} must be a file or one of {_tasks()}, got {source!r}")
        rng = random.Random(f"{seed} {task}")
        scenes = [sample_scene(rng, task) for _ in range(_DRAWN)]
        return [Prompt(scene.prompt, scene.metadata, core_source=core_source) for scene in scenes]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"{setting} must be a file or one of {_tasks()}, got {source!r}, which is not a file (current directory: "
            f"{Path.cwd()})"
        )
    suffix = path.suffix.lower()
    if suffix not in (*TEXT, *JSON_LINES):
        accepted = f".txt or none for a prompt per line, {' or '.join(JSON_LINES)} for a JSON object per line"
        raise ValueError(f"{setting} must be a file with the suffix {accepted}, got {source!r}")
    read = _from_json if suffix in JSON_LINES else _from_text
    prompts = [replace(read(path, number, line), core_source=core_source) for number, line in read_lines(path)]
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts


def digest(prompts: list[Prompt]) -> str:
    """A digest of the prompts and their metadata."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(json.dumps([prompt.text, prompt.metadata], sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def choose(prompts: list[Prompt], count: int, epoch: int, seed: int) -> list[Prompt]:
    """The prompts of an epoch. All prompts are used once, in random order, before any is used again."""
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
            raise ValueError(f"{path}, line {number}, is a JSON object: name the file .jsonl or .json")
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
        raise ValueError(f"{path}, line {number}, must not contain half a surrogate pair, got {lone}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}, is not valid JSON (one object per line): {error}") from error
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
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large for a float")
    return value


def _tasks() -> str:
    return ", ".join(SCENES + task for task in TASKS)
