"""Settings: presets, files and options in their order, and what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from star_trainer import command, config
from star_trainer.config import Config
from star_trainer.trainer import Trainer

PRESETS = sorted(path.stem for path in command.PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_read_as_written(preset: str) -> None:
    found = command.parse(["--preset", preset])
    config.check(found, 1)
    for part, values in yaml.safe_load((command.PRESETS / f"{preset}.yaml").read_text()).items():
        for name, value in values.items():
            assert getattr(getattr(found, part), name) == value, f"{part}.{name}"


def test_flow_grpos_settings_for_sd35_medium() -> None:
    """As its published configuration: 24 samples a prompt, 10 steps, noise 0.7, LoRA 32/64, clip 1e-4, lr 3e-4."""
    found = command.parse(["--preset", "sd35m-geneval"])
    assert (found.rollout.group_size, found.rollout.steps, found.rollout.noise_level) == (24, 10, 0.7)
    assert (found.rollout.guidance, found.rollout.resolution, found.evaluation.steps) == (4.5, 512, 40)
    assert (found.model.lora_rank, found.model.lora_alpha) == (32, 64)
    assert (found.train.learning_rate, found.train.clip_range, found.train.kl_coef) == (3e-4, 1e-4, 0.04)
    config.check(found, 8)


def test_options_come_after_files_and_files_after_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {learning_rate: 1.0e-5, epochs: 7}\n")
    found = command.parse(["--preset", "sd35m-ocr", "--config", str(path), "--train.epochs", "9"])
    assert (found.train.learning_rate, found.train.epochs, found.train.clip_range) == (1e-5, 9, 1e-4)


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.parse(["--help"])
    text = capsys.readouterr().out
    for part in fields(Config):
        made = getattr(Config(), part.name)
        assert is_dataclass(made)
        arguments = (made.__doc__ or "").split("Args:")[1]
        for setting in fields(made):
            assert f"--{part.name}.{setting.name}" in text
            assert f"\n        {setting.name}: " in arguments, f"{part.name}.{setting.name} is not in the docstring"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "sd4"], "--preset must be one of sd35m-geneval, sd35m-ocr, sd35m-pickscore, small, got 'sd4'"),
        (["--train.lerning_rate", "1"], "lerning_rate"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--rollout.transition", "ode"], "rollout.transition"),
    ],
)
def test_wrong_options_end_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.parse(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_key_of_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr: 1.0e-5}\n")
    with pytest.raises(SystemExit, match="2"):
        command.parse(["--config", str(path)])
    assert "lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parts", "processes", "message"),
    [
        ({"rollout": {"group_size": 1}}, 1, r"rollout\.group_size must be at least 2, got 1"),
        ({"train": {"updates": 3}}, 1, r"multiple of train\.updates \* processes = 3 \* 1, got 2 \* 2"),
        ({}, 3, r"multiple of train\.updates \* processes = 1 \* 3, got 2 \* 2"),
        ({"rollout": {"window": 3}}, 1, r"rollout\.window must lie between 1 and 2, got 3"),
        (
            {"rollout": {"window_end": 3}},
            1,
            r"rollout\.window_end must lie between 1 and rollout\.steps - 1 = 2, got 3",
        ),
        ({"train": {"steps": 3}}, 1, r"train\.steps must lie between 1 and the 2 noisy steps, got 3"),
        ({"train": {"ema": 1.0}}, 1, r"train\.ema must be at least 0 and below 1"),
        ({"reward": {"weights": {}}}, 1, r"reward\.weights must name at least one reward"),
        (
            {"allocation": {"credit": "phrase", "method": "plain"}},
            1,
            r"allocation\.credit must be 'image' with allocation\.method 'plain', got 'phrase'",
        ),
        (
            {"allocation": {"credit": "phrase", "source": "words"}},
            1,
            r"allocation\.source must be 'auto' with allocation\.credit 'phrase' .*got 'words'",
        ),
        ({"evaluation": {"steps": 0}}, 1, r"evaluation\.steps must be at least 1, got 0"),
    ],
)
def test_values_that_do_not_fit_are_named(
    configure: Callable[..., Config], parts: dict[str, dict[str, Any]], processes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.check(configure(**parts), processes)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (
            {"model": {"path": "./absent"}},
            ValueError,
            r"model\.path must be 'small', a folder or a hub id.*no such folder",
        ),
        ({"rollout": {"resolution": 33}}, ValueError, r"rollout\.resolution must be a multiple of 4"),
        ({"reward": {"weights": {"beauty": 1.0}}}, ValueError, "beauty"),
        ({"allocation": {"strength": 2.0}}, ValueError, "strength"),
        ({"allocation": {"cap": 0.5}}, ValueError, "cap"),
        ({"allocation": {"blocks": [7]}}, ValueError, "blocks"),
        (
            {"allocation": {"credit": "phrase"}},
            ValueError,
            r"allocation\.credit must be 'image' unless all of reward\.weights score phrases.*"
            "got 'phrase' with 'jpeg-compressibility'",
        ),
        (
            {"allocation": {"credit": "phrase"}, "reward": {"weights": {"scene": 0.0}}},
            ValueError,
            "got 'phrase' with none of a weight but 0",
        ),
        ({"rollout": {"noise_level": 0.0}}, ValueError, "noise_level"),
        ({"train": {"clip_range": -1.0}}, ValueError, "clip_range"),
    ],
)
def test_a_run_that_cannot_work_says_why(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    parts: dict[str, dict[str, Any]],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        trainer_of(configure(**parts)).run()


def test_a_folder_of_something_else_is_refused(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"model\.path: cannot load"):
        trainer_of(configure(model={"path": str(tmp_path / "model")}))


def test_the_command_reports_errors_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = command.main(["--data.prompts", str(tmp_path / "absent.txt"), "--output.folder", str(tmp_path / "run")])
    assert status == 1
    assert capsys.readouterr().err.startswith("star-train: error: data.prompts must be a file")
