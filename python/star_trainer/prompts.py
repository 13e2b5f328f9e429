"""Prompt files, and which prompts an epoch takes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from star_trainer.scenes import TASKS, sample_scene

SCENES = "scenes:"
_DRAWN = 4096  # prompts of a scene task


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a reward has to know about it."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


def load_prompts(source: str, *, seed: str = "train") -> list[Prompt]:
    """Prompts of a file, or of drawn scenes ("scenes:composition", "scenes:text").

    Args:
        source: a file with a prompt a line; or of JSON lines, each with a "prompt", the rest being metadata.
        seed: of drawn scenes; other seeds give other prompts.

    Raises:
        ValueError: an unknown task, or a line that cannot be read; the message names file and line.
        OSError: a file that cannot be read.
    """
    if source.startswith(SCENES):
        task = source.removeprefix(SCENES)
        if task not in TASKS:
            raise ValueError(f"data.prompts must be a file or one of {_tasks()}, got {source!r}")
        rng = random.Random(f"{seed} {task}")
        scenes = [sample_scene(rng, task) for _ in range(_DRAWN)]
        return [Prompt(scene.prompt, scene.metadata) for scene in scenes]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"data.prompts must be a file or one of {_tasks()}, got {source!r}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    json_lines = path.suffix in (".jsonl", ".json")
    prompts = [_from_json(path, n, line) if json_lines else Prompt(line) for n, line in numbered]
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


def _from_json(path: Path, number: int, line: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise ValueError(f'{path}, line {number}, must be an object with a "prompt", got {line[:80]!r}')
    return Prompt(record["prompt"], {key: value for key, value in record.items() if key != "prompt"})


def _tasks() -> str:
    return ", ".join(SCENES + task for task in TASKS)
