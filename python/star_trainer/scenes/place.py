"""Random scenes: a prompt of a task, and objects that fulfil it."""

from __future__ import annotations

import random

from star_trainer.scenes.describe import COLORS, COUNTS, RELATIONS, TASKS, WORDS, Thing, describe, describe_word
from star_trainer.scenes.draw import CANVAS, CELL, LETTER, RADII, SHAPES, Item, Scene, Word, word_width

_TRIES = 200
_GAP = 1
_LARGE = 0.2  # share of large things if the prompt names no size
_CLEAR = 4  # minimum distance between centres for a relation, in units of the canvas
_TAGS = {"single": 15, "two": 20, "three": 10, "position": 35, "counting": 20}  # per cent of composition prompts


def sample_scene(rng: random.Random, task: str) -> Scene:
    """A random scene of a task ("composition" or "text"), with its prompt and metadata.

    Raises:
        ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return _word(rng) if task == "text" else _composition(rng)


def _composition(rng: random.Random) -> Scene:
    (tag,) = rng.choices(list(_TAGS), list(_TAGS.values()))
    relation = rng.choice(RELATIONS) if tag == "position" else None
    if tag == "counting":
        things = [_thing(rng, count=rng.choice(list(COUNTS.values())))]
    else:
        number = {"single": 1, "two": 2, "position": 2, "three": 3}[tag]
        kinds = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], number)
        sized = tag == "single" and rng.random() < 0.5
        things = [Thing(shape, color, size=rng.choice(list(RADII)) if sized else None) for shape, color in kinds]
    prompt, metadata = describe(things, relation)
    single = [thing for thing in things for _ in range(thing.count)]
    for _ in range(_TRIES):
        items: list[Item] = []
        if all(_put(rng, thing, items, None) for thing in single) and _holds(relation, items):
            return Scene(prompt, metadata, tuple(items), None, _background(rng))
    raise RuntimeError(f"no placement found for {prompt!r}")


def _word(rng: random.Random) -> Scene:
    text, color = rng.choice(WORDS), rng.choice(COLORS)
    other = _thing(rng) if rng.random() < 0.5 else None
    prompt, metadata = describe_word(text, color, other)
    for _ in range(_TRIES):
        x = rng.randrange(CELL - LETTER[0] + 1, CANVAS - word_width(text), CELL)
        y = rng.randrange(CELL - LETTER[0], CANVAS - LETTER[0], CELL)
        word, items = Word(text, color, x, y), list[Item]()
        if other is None or _put(rng, other, items, word):
            return Scene(prompt, metadata, tuple(items), word, _background(rng))
    raise RuntimeError(f"no placement found for {prompt!r}")


def _thing(rng: random.Random, count: int = 1) -> Thing:
    return Thing(rng.choice(SHAPES), rng.choice(COLORS), count)


def _background(rng: random.Random) -> float:
    return rng.uniform(0.85, 1.0)


def _put(rng: random.Random, thing: Thing, items: list[Item], word: Word | None) -> bool:
    """Adds the thing at a free place, if a few attempts find one."""
    for _ in range(10):
        radius = RADII[thing.size or ("large" if rng.random() < _LARGE else "small")]
        first = radius + 1  # small things are centred in a cell, large ones where four cells meet
        x, y = (rng.randrange(first, CANVAS - radius, CELL) for _ in range(2))
        item = Item(thing.shape, thing.color, x, y, radius)
        if all(_apart(item, other) for other in items) and (word is None or _off(item, word)):
            items.append(item)
            return True
    return False


def _apart(a: Item, b: Item) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius + _GAP


def _off(item: Item, word: Word) -> bool:
    """Whether the item is above or below the word, because a ring beside it would be read as an o."""
    return item.y + item.radius < word.y or item.y - item.radius >= word.y + LETTER[0]


def _holds(relation: str | None, items: list[Item]) -> bool:
    if relation is None:
        return True
    dx, dy = items[1].x - items[0].x, items[1].y - items[0].y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along >= _CLEAR and along > abs(across)
