"""Settings: the precedence of presets, files and options, and errors of invalid files and options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator

from star_trainer import command, limits
from star_trainer.config import Config
from star_trainer.objectives import clip_range
from star_trainer.trainer import Trainer

PRESETS = sorted(path.stem for path in command.PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_read_as_written(preset: str) -> None:
    found = command.parse(["--preset", preset])
    limits.check(found, 1)
    for part, values in yaml.safe_load((command.PRESETS / f"{preset}.yaml").read_text()).items():
        for name, value in values.items():
            assert getattr(getattr(found, part), name) == value, f"{part}.{name}"


def test_flow_grpos_settings_for_sd35_medium() -> None:
    """The published configuration: 24 samples per prompt, 10 steps, noise 0.7, LoRA 32/64, clip 1e-4, lr 3e-4."""
    found = command.parse(["--preset", "sd35m-geneval"])
    assert (found.rollout.group_size, found.rollout.steps, found.rollout.noise_level) == (24, 10, 0.7)
    assert (found.rollout.guidance, found.rollout.resolution, found.evaluation.steps) == (4.5, 512, 40)
    assert (found.model.lora_rank, found.model.lora_alpha) == (32, 64)
    assert (found.train.learning_rate, clip_range(found.train), found.train.kl_coef) == (3e-4, 1e-4, 0.04)
    limits.check(found, 8)


@pytest.fixture
def parse_file(tmp_path: Path) -> Callable[..., Config]:
    """Returns the configuration of a file of settings, with options before and after it."""

    def parse(text: str, *options: str) -> Config:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return command.parse([*options[:2], "--config", str(path), *options[2:]])

    return parse


def test_options_override_files_and_files_override_the_preset(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {learning_rate: 1.0e-5, epochs: 7}\nrollout: {groups: 8}\n")
    second.write_text("train: {epochs: 8}\nrollout: {groups: 4}\n")
    files = ["--config", str(first), f"--config={second}"]
    for arguments in ([*files, "--train.epochs", "9"], ["--train.epochs", "9", *files]):
        found = command.parse(["--preset", "sd35m-ocr", *arguments])
        assert (found.train.learning_rate, found.train.epochs, found.train.kl_coef) == (1e-5, 9, 0.04)
        assert found.rollout.groups == 4


def test_a_file_may_select_a_preset(parse_file: Callable[..., Config]) -> None:
    assert parse_file("preset: sd35m-ocr\n").reward.weights == {"ocr": 1.0}
    assert parse_file("preset: sd35m-ocr\n", "--preset", "small").reward.weights == {"scene": 1.0}


def test_printed_settings_can_be_read_as_a_file(
    parse_file: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.parse(["--preset", "sd35m-geneval", "--train.learning_rate", "1e-5", "--print_config"])
    printed = capsys.readouterr().out
    assert parse_file(printed) == command.parse(["--preset", "sd35m-geneval", "--train.learning_rate", "1e-5"])


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "---\n", "train:\n", "train: {}\n", "\ufefftrain: {}\n"])
def test_a_file_without_settings_changes_nothing(parse_file: Callable[..., Config], text: str) -> None:
    assert parse_file(text) == command.parse([])


def test_words_that_are_booleans_in_yaml_1_1_are_strings(parse_file: Callable[..., Config]) -> None:
    text = (
        "preset: small\ntrain: {mixed_precision: no, learning_rate: 1e-5}\noutput: {resume: yes}\n"
        "rollout: {shared_noise: off}\ndata: {prompts: on}\n"
        "reward: {weights: {on: 1}, options: {on: {no: no, day: 2026-01-02}}}\n"
    )
    found = parse_file(text)
    assert (found.train.mixed_precision, found.train.learning_rate, found.data.prompts) == ("no", 1e-5, "on")
    assert (found.rollout.shared_noise, found.output.resume) == (False, True)
    assert found.reward.weights == {"on": 1.0}
    assert found.reward.options == {"on": {"no": "no", "day": "2026-01-02"}}


def test_anchors_and_merges_of_yaml_are_not_repeated_keys(parse_file: Callable[..., Config]) -> None:
    found = parse_file("rollout: &r {steps: 4}\nevaluation:\n  <<: *r\n  every: 3\n")
    assert (found.rollout.steps, found.evaluation.steps, found.evaluation.every) == (4, 4, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 1}\ndata: {}\ntrain: {}\n", "line 3: 'train' appears twice, in line 1 and in line 3"),
        ("train:\n  epochs: 1\n  'epochs': 2\n", "line 3: 'epochs' appears twice, in line 2 and in line 3"),
        ("reward:\n  weights: {ocr: 1, ocr: 2}\n", "line 2: 'ocr' appears twice"),
        ("train:\n  lerning_rate: 1\n", "line 2: unknown setting train.lerning_rate; did you mean learning_rate?"),
        ("trian: {epochs: 1}\n", "line 1: unknown setting trian; did you mean train?"),
        ("train.epochs: 1\n", "line 1: unknown setting train.epochs"),
        ("[train, data]\n", "must contain sections of settings (model, data, "),
        ("epochs\n", "must contain sections of settings (model, data, "),
        ("data: {}\ntrain: [1]\n", "line 2: train must be a section of settings, got [1]"),
        ("train: {epochs: 1\n", "line 2: "),
        ("train: {epochs: many}\n", 'mine.yaml: Parser key "train.epochs"'),
        ("train: {epochs: null}\n", "train.epochs must not be null"),
        ("output: {folder: null}\n", "output.folder must not be null"),
        ("rollout: {transition: null}\n", "rollout.transition must not be null"),
        ("data: {eval_prompts: ''}\n", "data.eval_prompts must name a file or be null, got ''"),
        ("preset: sd4\n", "--preset must be one of flux1-pickscore"),
    ],
)
def test_an_invalid_file_is_an_error_that_names_the_line(
    parse_file: Callable[..., Config], capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_file(text)
    assert message in capsys.readouterr().err


def test_paths_of_the_home_folder_are_expanded(
    parse_file: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (
        "model: {path: ~/model}\ndata: {prompts: ~/train.txt, eval_prompts: ~/held-out.txt}\noutput: {folder: ~/run}\n"
        "reward: {options: {scene: {model: ~/clip, folders: [~/a], sign: ~, word: a ~/b}}}\n"
    )
    for found in (parse_file(text), command.parse(["--config=~/mine.yaml"])):
        home = str(tmp_path)
        assert (found.model.path, found.output.folder) == (f"{home}/model", f"{home}/run")
        assert (found.data.prompts, found.data.eval_prompts) == (f"{home}/train.txt", f"{home}/held-out.txt")
        assert found.reward.options["scene"] == {
            "model": f"{home}/clip", "folders": [f"{home}/a"], "sign": None, "word": "a ~/b",
        }  # fmt: skip
    assert command.parse(["--output.folder=~/run"]).output.folder == f"{tmp_path}/run"


def test_help_is_short_before_the_settings_and_has_the_values_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.parse(["--preset", "sd35m-ocr", "--help"])
    text = capsys.readouterr().out
    assert text.startswith(
        "usage: star-train [--preset NAME] [--config FILE] [--SECTION.SETTING VALUE ...]\n\nstar-train:"
    )
    assert "learning rate of AdamW. (type: float, default: 0.0003)" in text


def test_every_setting_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
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
        (
            ["--preset", "sd4"],
            "--preset must be one of flux1-pickscore, qwen-image-pickscore, sd35m-geneval, sd35m-ocr, ",
        ),
        (["--train.lerning_rate", "1"], "--train.lerning_rate 1; did you mean --train.learning_rate?"),
        (["--train.lr", "1"], "--train.lr 1; did you mean --train.learning_rate?"),
        (["--config", "absent.yaml"], "--config must be a readable YAML file, got absent.yaml: No such file"),
        (["--train.max_grad_norm", "-1"], "train.max_grad_norm must be at least 0, got -1.0"),
        (["--reward.weights", "{scene: 1, scene: 2}"], "reward.weights"),
        (["--reward.weights", "ocr"], "such as --reward.weights '{ocr: 1.0, pickscore: 0.5}'"),
        (["--train", "{epochs: 1, epochs: 2}"], "'epochs' appears twice"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--rollout.transition", "ode"], "rollout.transition"),
        (["--allocation.over", "change"], "Literal['step', 'trajectory', 'total_variation']"),
    ],
)
def test_invalid_options_exit_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.parse(arguments)
    assert message in capsys.readouterr().err


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
            r"allocation\.credit must be 'image' unless all rewards in reward\.weights score phrases.*"
            "got 'phrase' with 'jpeg-compressibility'",
        ),
        (
            {"reward": {"weights": {"scene": 0.0, "jpeg-compressibility": 0.0}}},
            ValueError,
            r"reward\.weights must have a weight other than 0",
        ),
        ({"rollout": {"noise_level": 0.0}}, ValueError, "noise_level"),
        ({"train": {"clip_range": -1.0}}, ValueError, "clip_range"),
    ],
)
def test_a_run_with_invalid_settings_is_an_error_that_names_them(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    parts: dict[str, dict[str, Any]],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        trainer_of(configure(**parts)).run()


def test_gradient_accumulation_of_accelerate_is_refused(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is set by the file that ``accelerate config`` writes."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps must be 1, got 4: set train\.batch"):
        Trainer(configure(), Accelerator(cpu=True), progress=False)


def test_a_folder_without_a_pipeline_is_refused(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"model\.path: cannot load"):
        trainer_of(configure(model={"path": str(tmp_path / "model")}))


def test_the_command_reports_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = command.main(["--data.prompts", str(tmp_path / "absent.txt"), "--output.folder", str(tmp_path / "run")])
    assert status == 1
    assert capsys.readouterr().err.startswith("star-train: error: data.prompts must be a file")
