"""studies.learning and studies.learning_parts: designs, controls, statistics and commands."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from star_trainer.command import parse as parse_settings
from star_trainer.config import Config
from star_trainer.prompts import load_prompts
from star_trainer.scenes import SceneReward
from studies import learning, learning_parts


def test_paired_equals_students_t_test() -> None:
    from scipy.stats import ttest_1samp

    values = [0.02, 0.01, 0.03, -0.01, 0.02]
    mean, half_width, p = learning.paired(values)
    expected = ttest_1samp(values, 0.0)
    assert p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))
    assert math.isnan(learning.paired([1.0])[2])


def test_samples_to_is_the_interval_of_evaluations_in_which_the_mean_curve_reaches_the_goal() -> None:
    plain = {0: {"evaluations": [[0, 0.0], [10, 0.5], [20, 1.0]]}}
    fast = {0: {"evaluations": [[0, 0.0], [10, 0.8], [20, 1.2]]}}
    slow = {0: {"evaluations": [[0, 0.0], [10, 0.1], [20, 0.2]]}}
    early = {0: {"evaluations": [[0, 0.0], [10, 1.0], [20, 1.2]]}}
    assert learning.samples_to(plain, fast) == (0.5, 1.0)
    assert learning.samples_to(plain, plain) == (0.5, 1.0)
    assert learning.samples_to(plain, early) == (0.0, 0.5)
    assert learning.samples_to(plain, slow) == (1.0, math.inf)
    design = {"tasks": ["text"], "settings": {"evaluation.prompts": 1}}
    runs = [
        {
            "task": "text",
            "arm": arm,
            "seed": seed,
            "evaluations": [[e, r + seed / 8] for e, r in found[0]["evaluations"]],
        }
        for arm, found in (("plain", plain), ("fast", fast), ("early", early), ("slow", slow))
        for seed in (0, 1)
    ]
    lines = learning.text({"design": design, "runs": runs}).splitlines()
    by_arm = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert " 0.5 to 1 " in by_arm["fast"]
    assert " <= 0.5 " in by_arm["early"]
    assert " > 1 " in by_arm["slow"]


def test_early_is_the_last_reward_within_the_share_of_samples_minus_the_final_reward_of_plain() -> None:
    plain = {seed: {"evaluations": [[0, 0.0], [30, 1.0 + seed]]} for seed in (0, 1, 2)}
    runs = {seed: {"evaluations": [[0, 0.0], [10, 0.5], [21, 1.25], [22, 2.0], [30, 3.0]]} for seed in (2, 1)}
    assert learning.early(plain, runs) == [1.25 - 2.0, 1.25 - 3.0]


@pytest.mark.parametrize(
    "design",
    sorted(p for p in learning.DESIGNS.glob("*.yaml") if p.stem not in ("tuning", "missing", "noise")),
    ids=lambda p: p.stem,
)
def test_star_train_accepts_every_arm_of_a_committed_design(design: Path) -> None:
    found = yaml.safe_load(design.read_text())
    for arm in found["arms"].values():
        config = parse_settings([f"--{k}={v}" for k, v in {**found["settings"], **arm}.items() if k != "control"])
        assert arm.get("control", "shuffled") in learning.CONTROLS
        assert config.samples % config.train.updates == 0
    assert len(found["seeds"]) >= 5
    assert found["settings"]["evaluation.prompts"] >= 1024


@pytest.mark.parametrize("name", ["first", "main", "ratio", "text", "tuning", "when"])
def test_a_design_with_results_has_the_reward_and_the_samples_of_its_runs(name: str) -> None:
    """Of settings that the preset had at that time, or that were the only ones."""
    found = yaml.safe_load((learning.DESIGNS / f"{name}.yaml").read_text())["settings"]
    config = parse_settings([f"--{key}={value}" for key, value in found.items()])
    assert SceneReward(**config.reward.options["scene"]).rule == "nothing_else"
    assert config.samples == (128 if name in ("first", "tuning") else 256)
    assert (config.rollout.window, config.rollout.steps, config.rollout.guidance) == (2, 8, 1.0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("credit", ["image", "split"])
def test_shuffled_has_the_same_permutation_in_all_steps_of_a_sample(
    credit: Literal["image", "split"], config: Config, tmp_path: Path
) -> None:
    config = replace(
        config,
        data=replace(config.data, prompts="scenes:composition"),
        allocation=replace(config.allocation, blocks="all", credit=credit),
        output=replace(config.output, folder=str(tmp_path)),
    )
    prompts = [p for p in load_prompts("scenes:composition")[:3] for _ in range(2)]
    rolled = {
        control: learning.StudyTrainer(config, control, math.inf).roll_out(prompts, range(6))
        for control in (None, "shuffled")
    }
    own, moved = (torch.stack([s.weights.flatten(-2) for s in rolled[c].steps], dim=1) for c in rolled)
    assert own.shape == moved.shape
    for before, after in zip(own.flatten(1, -2), moved.flatten(1, -2), strict=True):
        assert not torch.equal(before, after)
        columns = sorted(before.T.tolist())
        assert sorted(after.T.tolist()) == columns  # a position keeps its steps and phrases


@pytest.mark.exhaustive
def test_inverted_weights_have_mean_one_and_the_reverse_order(config: Config, tmp_path: Path) -> None:
    config = replace(
        config,
        data=replace(config.data, prompts="scenes:composition"),
        allocation=replace(config.allocation, blocks="all"),
        output=replace(config.output, folder=str(tmp_path)),
    )
    prompts = [p for p in load_prompts("scenes:composition")[:2] for _ in range(2)]
    own, inverted = (
        learning.StudyTrainer(config, control, math.inf).roll_out(prompts, range(4)).steps[0].weights.flatten(1)
        for control in (None, "inverted")
    )
    torch.testing.assert_close(inverted.mean(dim=1), torch.ones(4))
    assert torch.equal(inverted.argmax(dim=1), own.argmin(dim=1))
    assert torch.equal(inverted.argmin(dim=1), own.argmax(dim=1))


@pytest.mark.exhaustive
def test_a_study_runs_resumes_and_reports(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "model.path": str(pipeline_folder), "allocation.blocks": "all",
        "train.epochs": 2, "rollout.steps": 3, "rollout.groups": 1, "rollout.group_size": 2,
        "rollout.batch": 2, "rollout.window": 1, "rollout.window_end": 2, "evaluation.every": 1,
        "evaluation.prompts": 2, "evaluation.steps": 2,
    }  # fmt: skip
    arms = {"plain": {"allocation.method": "plain"}, "star": {}, "shuffled": {"control": "shuffled"}}
    design = tmp_path / "design.yaml"
    design.write_text(yaml.safe_dump({"tasks": ["text"], "seeds": [0, 1], "arms": arms, "settings": settings}))
    command = ["--design", str(design), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")]
    assert learning.main([*command, "--minutes", "0"]) == 0
    assert "6 runs are not finished" in capsys.readouterr().out
    for _ in range(7):  # the time limit allows one epoch for each call
        assert learning.main([*command, "--minutes", "0.0001", "--worker", "0/1"]) == 0
    learning.main(command)
    assert "all runs are finished" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["runs"]) == 6
    assert all(len(run["rollouts"]) == 2 and len(run["evaluations"]) == 3 for run in found["runs"])
    learning.main([*command, "--report"])
    assert "plain" in capsys.readouterr().out
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.exhaustive
def test_the_parts_of_the_reward_sum_to_the_reward(pipeline_folder: Path, tmp_path: Path) -> None:
    settings = {
        "model.path": str(pipeline_folder), "allocation.blocks": "all", "train.epochs": 1, "rollout.steps": 3,
        "rollout.groups": 1, "rollout.group_size": 2, "rollout.batch": 2, "rollout.window": 1, "rollout.window_end": 2,
        "evaluation.every": 1, "evaluation.prompts": 2, "evaluation.steps": 2,
    }  # fmt: skip
    design = tmp_path / "design.yaml"
    arms = {"plain": {"allocation.method": "plain"}}
    design.write_text(yaml.safe_dump({"tasks": ["composition"], "seeds": [0, 1], "arms": arms, "settings": settings}))
    learning.train(learning.Unit("composition", "plain", 0), yaml.safe_load(design.read_text()), tmp_path, math.inf)
    command = ["--design", str(design), "--runs", str(tmp_path), "--prompts", "70", "--out", str(tmp_path / "out.json")]
    assert learning_parts.main(command) == 0
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [("start", None), ("plain", 0)]
    for run in runs:
        assert run["phrases"] + run["rest"] == pytest.approx(run["reward"], abs=2e-4)
        assert run["surplus"] + run["missing"] > 0
