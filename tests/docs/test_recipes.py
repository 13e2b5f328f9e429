"""The recipes' files and commands are accepted by the driver, and the example reward is one."""

from __future__ import annotations

import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from pages import ROOT, blocks

pytest.importorskip("jsonargparse")

from star_trainer import command, limits
from star_trainer.prompts import load_prompts
from star_trainer.rewards.ocr import target_text
from star_trainer.rewards.registry import build
from star_trainer.scenes import draw, sample_scene

PAGE = ROOT / "docs" / "recipes.md"
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))


def commands() -> list[list[str]]:
    """The arguments of every star-train command of the page, whichever way it is launched."""
    lines = [line for block in blocks(PAGE, "sh") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    found = []
    for line in lines:
        words = shlex.split(line)
        start = words.index("star-train" if "star-train" in words else "star_trainer")
        found.append(words[start + 1 :])
    return found


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the page says to run its commands, which name files by relative paths."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_taken_by_the_driver(recipe: Path) -> None:
    limits.check(command.parse(["--config", str(recipe)]), 1)


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_a_command_of_the_page_is_taken_by_the_driver(arguments: list[str]) -> None:
    found = command.parse(arguments)
    limits.check(found, 1 if found.model.path == "small" else 8)
    if Path(found.data.prompts).parent.name == "recipes" or found.data.prompts.startswith("scenes:"):
        assert load_prompts(found.data.prompts)


def test_every_recipe_has_a_command_for_the_small_model_and_for_sd35_medium() -> None:
    for recipe in RECIPES:
        own = [arguments for arguments in commands() if f"examples/recipes/{recipe.name}" in arguments]
        assert sorted(command.parse(arguments).model.path for arguments in own) == [
            "small",
            "stabilityai/stable-diffusion-3.5-medium",
        ]


def test_labels_quote_the_text_that_their_metadata_asks_for() -> None:
    for prompt in load_prompts("examples/recipes/labels.jsonl"):
        assert target_text(prompt.text, {}) == prompt.metadata["text"]


def test_the_example_reward_prefers_the_brands_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "recipes"))
    settings = command.parse(["--config", "examples/recipes/house-style.yaml"]).reward
    reward = build({"house_style:HouseStyle": 1.0}, options=settings.options)
    (palette,) = [list(options["palette"]) for options in settings.options.values()]
    ours = torch.tensor([int(palette[1][i : i + 2], 16) / 255 for i in (1, 3, 5)]).view(3, 1, 1).expand(3, 8, 8)
    near, far = (ours + 0.1).clamp(0, 1), torch.tensor([0.1, 0.62, 0.22]).view(3, 1, 1).expand(3, 8, 8)
    scores = reward(torch.stack([ours, near, far]), ["", "", ""], [{}, {}, {}])
    assert float(scores[0]) == pytest.approx(1.0, abs=1e-3)
    assert float(scores[0]) > float(scores[1]) > float(scores[2])


def test_the_house_style_and_the_scenes_checker_score_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "recipes"))
    settings = command.parse(["--config", "examples/recipes/house-style.yaml"]).reward
    scenes = [sample_scene(random.Random(seed), "composition") for seed in range(2)]
    scores = build(settings.weights, options=settings.options).scores(
        torch.stack([draw(scene) for scene in scenes]), [s.prompt for s in scenes], [s.metadata for s in scenes]
    )
    assert set(scores.parts) == {"scene", "house-style"}
    torch.testing.assert_close(scores.total, scores.parts["scene"] + 0.5 * scores.parts["house-style"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"palette": []}, "palette"),
        ({"palette": ["red"]}, "'red'"),
        ({"palette": ["#ffffff"], "tolerance": 0}, "tolerance"),
    ],
)
def test_bad_options_of_the_example_reward_are_named(
    options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "recipes"))
    with pytest.raises(ValueError, match=re.escape(message)):
        build({"house_style:HouseStyle": 1.0}, options={"house_style:HouseStyle": options})
