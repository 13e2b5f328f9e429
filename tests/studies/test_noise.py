"""studies.noise: its design, its runs and the samples to a goal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from star_trainer.command import parse as parse_settings
from studies import noise


def test_samples_to_is_interpolated_between_evaluations() -> None:
    points = [[0, 0.4], [100, 0.5], [200, 0.7], [300, 0.6]]
    assert noise.samples_to(points, 0.6) == pytest.approx(150)
    assert noise.samples_to(points, 0.4) == 0
    assert math.isinf(noise.samples_to(points, 0.8))


def test_star_train_accepts_every_run_of_the_committed_design() -> None:
    design = yaml.safe_load((noise.DESIGNS / "noise.yaml").read_text())
    found = list(noise.cells(design))
    assert len(set(found)) == len(found)
    for cell in found:
        config = parse_settings([f"--{name}={value}" for name, value in noise.settings(cell, design).items()])
        assert config.samples == cell.samples
        assert config.evaluation.every * cell.samples == design["evaluate_every"]
        assert config.train.epochs % config.evaluation.every == 0


def test_samples_that_do_not_divide_the_evaluations_are_refused() -> None:
    design = yaml.safe_load((noise.DESIGNS / "noise.yaml").read_text())
    with pytest.raises(ValueError, match="evaluate_every, that of 96 samples"):
        noise.settings(noise.Cell("first two steps", 96, 1e-4, 0), design)


@pytest.mark.exhaustive
def test_a_study_stores_every_run_and_ends_a_run_at_its_goal(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"rollout.steps": 3, "rollout.window": 1, "rollout.window_end": 2}
    design: dict[str, Any] = {
        "task": "text", "most_samples": 8, "evaluate_every": 4, "seeds": [0],
        "steps": {"easy": {"goal": 0.0, "settings": tiny}, "hard": {"goal": 2.0, "settings": tiny}},
        "settings": {
            "model.path": str(pipeline_folder), "data.prompts": "scenes:text", "allocation.method": "plain",
            "rollout.group_size": 2, "rollout.batch": 2, "evaluation.prompts": 2, "evaluation.steps": 2,
        },
        "order": [["hard", 4, 1e-4], ["easy", 2, 1e-4]],
    }  # fmt: skip
    path = tmp_path / "design.yaml"
    path.write_text(yaml.safe_dump(design))
    command = ["--design", str(path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")]
    noise.main([*command, "--minutes", "0.0001"])  # the time limit allows one epoch
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert not noise.ended(run, design)
    assert len(run["rollouts"]) == 1
    noise.main(command)
    hard, easy = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert noise.ended(hard, design)
    assert noise.ended(easy, design)
    assert [point[0] for point in hard["evaluations"]] == [0, 4, 8]
    assert [point[0] for point in easy["evaluations"]] == [0]
    assert "2 of 2 runs have ended" in capsys.readouterr().out
    noise.main([*command, "--report"])
    assert "hard: samples until the reward is 2" in capsys.readouterr().out
