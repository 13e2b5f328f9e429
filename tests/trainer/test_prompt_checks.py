"""Prompts that cannot be used are errors before a run begins, which name file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from star_trainer import trainer
from star_trainer.config import Config
from star_trainer.prompt_checks import check_prompts
from star_trainer.prompts import load_prompts
from star_trainer.rewards.geneval.reward import GenEval
from star_trainer.rewards.ocr import Ocr
from star_trainer.rewards.weighted import WeightedSum
from star_trainer.scenes import SceneReward
from star_trainer.trainer import Trainer

BENCH = {"prompt": "a photo of a bench", "include": [{"class": "bench", "count": 1}]}
REWRITTEN = {"prompt": "a wooden seat in a park", "include": [{"class": "bench", "count": 1}]}


class Plain:
    """A reward that does not check prompts."""

    name = "plain"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        return torch.zeros(len(images))


class Short(Plain):
    """A reward that only accepts short prompts."""

    def check_prompt(self, prompt: str, metadata: Any) -> None:
        if len(prompt) > 5:
            raise ValueError(f"too long: {prompt!r}")


def without_models(kind: type, **attributes: Any) -> Any:
    reward = object.__new__(kind)
    vars(reward).update(attributes)
    return reward


def check(config: Config, *rewards: Any) -> None:
    """Checks prompts in the same way as a run."""
    prompts = load_prompts(config.data.prompts, core_source=config.allocation.source)
    held_out = load_prompts(config.data.eval_prompts or config.data.prompts, seed="evaluation")
    named = {f"r{n}": reward for n, reward in enumerate(rewards or [Plain()])}
    check_prompts(prompts, held_out, WeightedSum(named, dict.fromkeys(named, 1.0)), config)


@pytest.fixture
def geneval_file(tmp_path: Path) -> Callable[..., str]:
    def write(*records: dict[str, Any], name: str = "geneval.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return str(path)

    return write


@pytest.mark.parametrize("source", ["auto", "geneval"])
def test_metadata_that_does_not_match_its_prompt_is_found_in_the_last_line(
    configure: Callable[..., Config], geneval_file: Callable[..., str], source: str
) -> None:
    path = geneval_file(BENCH, BENCH, REWRITTEN)
    config = configure(data={"prompts": path}, allocation={"source": source})
    with pytest.raises(ValueError, match=rf"allocation\.source '{source}': {path}, line 3: .* got 'bench'"):
        check(config)
    check(configure(data={"prompts": path}, allocation={"source": "words"}))
    check(configure(data={"prompts": path}, allocation={"method": "plain"}))
    check(configure(data={"prompts": geneval_file(BENCH), "eval_prompts": path}))  # no maps are taken there


def test_the_message_counts_the_other_failures(
    configure: Callable[..., Config], geneval_file: Callable[..., str]
) -> None:
    path = geneval_file(*[BENCH, REWRITTEN] * 8)
    message = r"line 2: .*; 7 more of the 16 prompts fail \(lines 4, 6, 8, 10, \.\.\.\)$"
    with pytest.raises(ValueError, match=message):
        check(configure(data={"prompts": path}))


def test_prompts_that_rewards_cannot_score_are_named_by_file_and_line(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text('a sign "one"\n')
    bad.write_text('a sign "one"\n\na sign\n')
    ocr = without_models(Ocr)
    check(configure(data={"prompts": str(good)}), ocr)
    with pytest.raises(ValueError, match=rf"{bad}, line 3: reward .*: ocr requires metadata with a \"text\""):
        check(configure(data={"prompts": str(bad)}), Plain(), ocr)
    config = configure(data={"prompts": str(good), "eval_prompts": str(bad)}, evaluation={"every": 1})
    with pytest.raises(ValueError, match=rf"{bad}, line 3: reward .*: ocr requires"):
        check(config, ocr)
    check(configure(data={"prompts": str(good), "eval_prompts": str(bad)}), ocr)  # evaluation is never


def test_geneval_requires_classes_of_its_detector(
    configure: Callable[..., Config], geneval_file: Callable[..., str]
) -> None:
    class Detector:
        classes = ("dog",)

    reward = without_models(GenEval, _detect=Detector())
    with pytest.raises(ValueError, match=r"line 1: reward .*: metadata must name .* detector \(dog\), got bench"):
        check(configure(data={"prompts": geneval_file(BENCH)}), reward)
    with pytest.raises(ValueError, match=r'line 1: reward .*: geneval requires metadata with an "include"'):
        check(configure(data={"prompts": geneval_file({"prompt": "a dog"})}), reward)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, 'must have "include" or "text"'),
        ({"text": ""}, 'a "text" that is not empty'),
        ({"include": []}, "include"),
        ({"include": [{"class": "ring"}]}, '"count" of at least 1'),
        ({"include": [{"class": "ring", "count": 1, "size": "huge"}]}, '"size" must be one of small, large'),
    ],
)
def test_the_scene_reward_requires_metadata_of_scenes(
    configure: Callable[..., Config], geneval_file: Callable[..., str], metadata: dict[str, Any], message: str
) -> None:
    path = geneval_file({"prompt": "a ring", **metadata})
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        check(configure(data={"prompts": path}, allocation={"source": "words"}), SceneReward())


def test_drawn_scenes_pass(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("star_trainer.prompts._DRAWN", 64)
    for task in ("scenes:composition", "scenes:text"):
        check(configure(data={"prompts": task}, evaluation={"every": 1}), SceneReward())


def test_prompts_whose_samples_will_be_skipped_warn(configure: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a dog\na zebra\na horse\n")
    with pytest.warns(RuntimeWarning, match=r"line 2: .*too long.*1 more of the 3 .*their samples will be skipped"):
        check(configure(data={"prompts": str(path)}, reward={"on_failure": "skip"}), Short())


def test_unusable_prompts_end_a_run_before_the_model_is_loaded(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    geneval_file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the model is loaded and the folder is created."""
    monkeypatch.setattr(trainer, "Policy", lambda *arguments: pytest.fail("the model is loaded"))
    with pytest.raises(ValueError, match=r"geneval\.jsonl, line 2: metadata must match the prompt, got 'bench'"):
        trainer_of(configure(data={"prompts": geneval_file(BENCH, REWRITTEN)}))
    assert not (tmp_path / "run").exists()
