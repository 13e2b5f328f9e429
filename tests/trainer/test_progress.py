"""The lines that a run prints."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from accelerate import Accelerator

from star_trainer.config import Config
from star_trainer.progress import duration
from star_trainer.trainer import Trainer


def lines_of(config: Config, caplog: pytest.LogCaptureFixture, *, progress: bool) -> list[str]:
    with caplog.at_level(logging.INFO, logger="star_trainer"):
        Trainer(config, Accelerator(cpu=True), progress=progress).run()
    return [record.message for record in caplog.records if record.name == "star_trainer"]


def test_a_run_prints_what_it_trains_its_epochs_and_its_evaluations(
    configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(train={"epochs": 2}, evaluation={"every": 2}, rollout={"steps": 4, "window": 2})
    header, work, folder, *lines = lines_of(config, caplog, progress=True)
    assert header.startswith(f"model {config.model.path}: ")
    assert header.endswith(", on cpu")
    assert "trained parameters (all weights)" in header
    assert work == "2 epochs of 4 samples (2 prompts x 2), 4 denoising steps of which 2 are trained"
    assert folder.endswith(config.output.folder)
    kinds = [
        "evaluation after epoch 0: reward ",
        "epoch 1/2: reward ",
        "epoch 2/2: reward ",
        "evaluation after epoch 2",
    ]
    assert [line.startswith(kind) for line, kind in zip(lines, kinds, strict=True)] == [True] * 4
    assert ["left" in line for line in lines] == [False, True, False, False]


def test_other_processes_print_nothing(configure: Callable[..., Config], caplog: pytest.LogCaptureFixture) -> None:
    assert lines_of(configure(), caplog, progress=False) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
