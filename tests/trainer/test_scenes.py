"""Drawn scenes: the checker accepts drawn scenes and detects each deviation from the prompt."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from star_kernels.prompts import core_content
from star_trainer.rewards.base import PhraseReward, Reward
from star_trainer.scenes import (
    RULES,
    TASKS,
    WORDS,
    Item,
    Scene,
    SceneReward,
    Word,
    check,
    describe,
    draw,
    masks,
    sample_scene,
    vocabulary,
)
from star_trainer.scenes.describe import Thing

RED_CIRCLE, BLUE_SQUARE = Item("circle", "red", 8, 16, 7), Item("square", "blue", 24, 16, 3)


def judge(scene: Scene, metadata: Any, rule: Any = "geneval") -> tuple[float, bool]:
    graded, exact, _ = check(draw(scene)[None], [metadata], rule=rule)
    return float(graded[0]), bool(exact[0])


def composition(*items: Item) -> Scene:
    return Scene("", {}, items, None, 0.95)


def word(text: str, color: str = "black", x: int = 1, y: int = 9) -> Scene:
    return Scene("", {}, (), Word(text, color, x, y), 0.95)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("task", TASKS)
def test_every_drawn_scene_fulfils_its_prompt(task: str, size: int) -> None:
    rng = random.Random(f"{task} {size}")
    scenes = [sample_scene(rng, task) for _ in range(150)]
    images = torch.stack([draw(scene, size) for scene in scenes])
    for rule in RULES:
        graded, exact, _ = check(images, [scene.metadata for scene in scenes], rule=rule)
        assert bool(exact.all()), [scene.prompt for scene, good in zip(scenes, exact, strict=True) if not good]
        assert graded.min() > 0.95


def test_a_scene_is_the_same_for_the_same_seed() -> None:
    for task in TASKS:
        first, second, other = (sample_scene(random.Random(seed), task) for seed in (1, 1, 2))
        assert first == second
        assert first.prompt != other.prompt or first.items != other.items


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("items", "exact"),
    [
        ((RED_CIRCLE, BLUE_SQUARE), True),
        ((replace(RED_CIRCLE, x=23), replace(BLUE_SQUARE, x=6)), False),  # on the other side
        ((replace(RED_CIRCLE, color="blue"), replace(BLUE_SQUARE, color="red")), False),  # colours exchanged
        ((replace(RED_CIRCLE, shape="ring"), BLUE_SQUARE), False),
        ((RED_CIRCLE,), False),
        ((), False),
    ],
)
def test_a_relation_between_two_things(items: tuple[Item, ...], exact: bool, rule: str) -> None:
    prompt, metadata = describe([Thing("square", "blue"), Thing("circle", "red")], "left of")
    assert prompt == "a red circle left of a blue square"
    graded, found = judge(composition(*items), metadata, rule)
    assert found is exact
    assert (graded > 0.95) is exact


@pytest.mark.parametrize("shape", ["cross", "circle"])
@pytest.mark.parametrize("color", ["green", "red"])
def test_something_else_or_one_more_counts_only_with_the_rule_that_names_it(shape: str, color: str) -> None:
    _, metadata = describe([Thing("square", "blue"), Thing("circle", "red")], "left of")
    scene = composition(RED_CIRCLE, BLUE_SQUARE, Item(shape, color, 24, 27, 3))
    graded, exact = judge(scene, metadata)
    assert exact
    assert graded > 0.95
    graded, exact = judge(scene, metadata, "nothing_else")
    assert not exact
    assert graded == pytest.approx((3 + 0.5) / 4, abs=0.03)  # two objects, their relation, and three instead of two


@pytest.mark.parametrize(
    ("rule", "expected"), [("geneval", (0.0, 0.75, 1.0, 0.75)), ("nothing_else", (0.0, 0.67, 1.0, 0.67))]
)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_count(count: int, rule: str, expected: tuple[float, ...]) -> None:
    _, metadata = describe([Thing("ring", "green", count=2)])
    items = [Item("ring", "green", 5 + 9 * n, 10, 3) for n in range(count)]
    graded, exact = judge(composition(*items), metadata, rule)
    assert exact is (count == 2)
    assert graded == pytest.approx(expected[count], abs=0.03)


@pytest.mark.parametrize(
    ("more", "exact"),
    [
        (Item("square", "green", 5, 27, 3), True),  # of another class
        (Item("ring", "blue", 5, 27, 3), False),  # of the counted class, as in GenEval's "exclude"
    ],
)
def test_a_count_is_that_of_its_class(more: Item, exact: bool) -> None:
    _, metadata = describe([Thing("ring", "green", count=2)])
    rings = [Item("ring", "green", 5 + 9 * n, 10, 3) for n in range(2)]
    assert judge(composition(*rings, more), metadata)[1] is exact
    both = {"include": [*metadata["include"], {"class": "ring", "color": "blue", "count": 1}]}
    assert judge(composition(*rings, Item("ring", "blue", 5, 27, 3)), both)[1]  # counted by another entry


def test_a_size() -> None:
    _, metadata = describe([Thing("circle", "red", size="large")])
    assert judge(composition(RED_CIRCLE), metadata)[1]
    graded, exact = judge(composition(replace(RED_CIRCLE, radius=3)), metadata)
    assert not exact
    assert graded < 0.8


@pytest.mark.parametrize(
    ("drawn", "score"), [("star", 1.0), ("stir", 0.75), ("tar", 0.75), ("st", 0.5), ("moon", 0.0), (None, 0.0)]
)
def test_a_word_is_judged_by_its_edit_distance(drawn: str | None, score: float) -> None:
    scene = word(drawn) if drawn else composition()
    graded, exact = judge(scene, {"text": "star"})
    assert graded == pytest.approx(score)
    assert exact is (score == 1)


def test_letters_are_read_in_any_colour_and_beside_a_shape() -> None:
    for color in ("red", "yellow", "purple"):
        assert judge(replace(word("fox", color), items=(Item("circle", "green", 20, 26, 3),)), {"text": "fox"})[1]


def test_noise_contains_no_words_and_no_shapes() -> None:
    noise = torch.rand(8, 3, 32, 32)
    graded, exact, _ = check(noise, [{"text": "star"}] * 4 + [describe([Thing("circle", "red")])[1]] * 4)
    assert not exact.any()
    assert graded.mean() < 0.4


def test_masks_cover_what_is_drawn() -> None:
    scene = replace(composition(RED_CIRCLE), word=Word("on", "black", 17, 17))
    covered = masks(scene, 32)
    assert covered.shape == (2, 32, 32)
    assert covered[0, 16, 8] == 1
    assert covered[1].sum() == covered[1].count_nonzero()  # letters fill their pixels
    assert torch.equal(draw(scene)[:, covered.sum(0) == 0].unique(), torch.tensor([0.95]))
    assert masks(composition(), 32).shape == (0, 32, 32)


def test_prompts_name_their_core_content_as_geneval_metadata_does() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_scene(rng, "composition")
        core = core_content(scene.prompt, "geneval", metadata=scene.metadata)
        relations = sum("position" in entry for entry in scene.metadata["include"])
        assert len(core.phrases) == len(scene.metadata["include"]) + relations
        assert check(draw(scene)[None], [scene.metadata]).phrases.shape == (1, len(core.phrases))
    for _ in range(50):
        scene = sample_scene(rng, "text")
        assert list(core_content(scene.prompt, "quoted").words) == [scene.metadata["text"]]


def test_the_vocabulary_has_every_word_outside_of_quotes() -> None:
    known, rng = set(vocabulary()), random.Random(0)
    for task in TASKS:
        for _ in range(200):
            prompt = sample_scene(rng, task).prompt
            assert {w for w in prompt.replace(",", "").split() if not w.startswith('"')} <= known, prompt
    assert len(WORDS) == len(set(WORDS))


def test_the_reward_is_the_graded_verdict_or_the_strict_one() -> None:
    images = torch.stack([draw(word("star")), draw(word("stir"))])
    records: list[dict[str, Any]] = [{"text": "star"}] * 2
    assert SceneReward()(images, ["", ""], records).tolist() == [1.0, 0.75]
    assert SceneReward(strict=True)(images, ["", ""], records).tolist() == [1.0, 0.0]
    assert isinstance(SceneReward(), Reward)
    assert isinstance(SceneReward(), PhraseReward)
    assert SceneReward(strict=True).by_phrase(images, ["", ""], records)[1].tolist() == [[1.0], [0.75]]
    crowd = draw(composition(RED_CIRCLE, BLUE_SQUARE))[None]
    circle = [describe([Thing("circle", "red")])[1]]
    assert SceneReward(strict=True)(crowd, [""], circle).tolist() == [1.0]
    assert SceneReward(strict=True, rule="nothing_else")(crowd, [""], circle).tolist() == [0.0]


def test_phrases_are_scored_separately() -> None:
    pair = describe([Thing("square", "blue"), Thing("circle", "red")], "left of")[1]
    single = describe([Thing("circle", "red")])[1]
    alone = draw(composition(RED_CIRCLE))
    images, records = torch.stack([alone, alone, draw(word("stir"))]), [pair, single, {"text": "star"}]
    graded, _, phrases = check(images, records)
    torch.testing.assert_close(phrases[0], torch.tensor([0.0, 1 / 3, 0.0]))  # no square, a circle, and no relation
    assert phrases[1:, 0].tolist() == [1.0, 0.75]
    assert phrases[1:, 1].isnan().all()
    torch.testing.assert_close(phrases.nansum(1), graded)
    graded, _, phrases = check(images, records, rule="nothing_else")
    assert phrases[0].tolist() == [0.0, 0.25, 0.0]
    assert phrases[1, 0] == 0.5  # the other half: nothing else is there
    assert graded.tolist() == [0.25 + 0.125, 1.0, 0.75]


def test_the_scores_of_phrases_have_the_order_of_the_core_content() -> None:
    """If the objects of one phrase are removed from the image, the score of that phrase decreases."""
    rng, lost, relations = random.Random(0), 0, 0
    for _ in range(100):
        scene = sample_scene(rng, "composition")
        include = scene.metadata["include"]
        names = core_content(scene.prompt, metadata=scene.metadata).names
        whole = SceneReward().by_phrase(draw(scene)[None], [scene.prompt], [scene.metadata])[1][0]
        assert len(whole) == len(names)
        for entry in include:
            left = tuple(i for i in scene.items if (i.shape, i.color) != (entry["class"], entry["color"]))
            found = check(draw(replace(scene, items=left))[None], [scene.metadata]).phrases[0]
            mine = [n for n, name in enumerate(names) if entry["color"] in name and entry["class"] in name]
            related = [n for n, name in enumerate(names) if any(name == e.get("position", [""])[0] for e in include)]
            changed = (found < whole).nonzero().flatten().tolist()
            assert changed == [*mine, *related], (scene.prompt, names)
            lost, relations = lost + len(mine), relations + len(related)
    assert lost > 150
    assert relations > 20


def test_invalid_input_is_an_error_that_names_it() -> None:
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match='metadata must have "include" or "text"'):
        check(image, [{"prompt": "a dog"}])
    with pytest.raises(ValueError, match="an entry for each of the 1 images, got 2"):
        check(image, [{"text": "a"}] * 2)
    for call in (lambda: check(image, [{"text": "a"}], rule="all"), lambda: SceneReward(rule="all")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="rule must be one of geneval, nothing_else, got 'all'"):
            call()
    with pytest.raises(
        ValueError, match=r"images must be \[N, 3, S, S\] with S a multiple of 32, got \[1, 3, 40, 40\]"
    ):
        check(torch.zeros(1, 3, 40, 40), [{"text": "a"}])
    with pytest.raises(ValueError, match="size must be a multiple of 32, got 48"):
        draw(composition(), 48)
    with pytest.raises(ValueError, match="task must be one of composition, text, got 'poem'"):
        sample_scene(random.Random(0), "poem")
