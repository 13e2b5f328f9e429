"""Failures during a run: the error or the skipped samples are as documented, and no completed epoch is lost."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rewards_that_fail
import torch
from safetensors.torch import load_file

from star_trainer import checkpoint, command
from star_trainer import trainer as module
from star_trainer.config import Config
from star_trainer.record import Record, read_metrics
from star_trainer.rewards.base import RewardError
from star_trainer.trainer import Trainer


@pytest.fixture
def failing(configure: Callable[..., Config]) -> Iterator[Callable[..., Config]]:
    rewards_that_fail.released.clear()

    def make(how: str, on_failure: str = "stop", after: int = 0, **parts: dict[str, Any]) -> Config:
        key = "rewards_that_fail:Failing"
        reward = {
            "weights": {key: 1.0},
            "options": {key: {"how": how, "after": after, "sample": 1}},
            "on_failure": on_failure,
            "timeout": 0.2 if how == "hang" else 60.0,
        }
        return configure(reward=reward, **parts)

    yield make
    rewards_that_fail.released.set()


@pytest.mark.parametrize(
    ("how", "message"), [("raise", "no answer from the judge"), ("hang", "0.2 s"), ("nan", "finite|NaN|nan")]
)
def test_stop_names_the_reward_and_the_sample(
    failing: Callable[..., Config], trainer_of: Callable[[Config], Trainer], how: str, message: str
) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        trainer_of(failing(how)).run()
    assert "failing" in str(caught.value)
    assert "sample" in str(caught.value)


def test_stop_saves_the_completed_epochs(
    failing: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    """There are two batches per epoch, so that the fifth call is in the third epoch."""
    with pytest.raises(RewardError):
        trainer_of(failing("raise", after=4, train={"epochs": 5})).run()
    folder = tmp_path / "run"
    assert [path.name for path in checkpoint.find(folder)] == ["checkpoint-000002"]
    resumed = failing("raise", after=4, train={"epochs": 3}, output={"resume": True})
    trainer = trainer_of(resumed)
    assert trainer.epoch == 2
    trainer.run()
    assert [path.name for path in checkpoint.find(folder)] == ["checkpoint-000002", "checkpoint-000003"]


@pytest.mark.parametrize(("how", "skipped"), [("nan", 1), ("raise", 4), ("hang", 4)])
def test_skip_trains_on_the_other_samples(
    failing: Callable[..., Config], trainer_of: Callable[[Config], Trainer], how: str, skipped: int
) -> None:
    trainer = trainer_of(failing(how, on_failure="skip", after=1, rollout={"group_size": 4, "batch": 4}))
    with pytest.warns(RuntimeWarning, match="failing"):
        metrics = trainer.train_epoch()
    assert metrics["skipped"] == skipped
    assert 0 < metrics["reward"] < 1.5
    assert metrics["loss/grad_norm"] > 0


def test_an_epoch_without_any_reward_stops_the_run(
    failing: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    trainer = trainer_of(failing("hang", on_failure="skip"))
    with (
        pytest.warns(RuntimeWarning, match="failing"),
        pytest.raises(RewardError, match="after epoch 0 none of the 4 samples has a reward"),
    ):
        trainer.train_epoch()


def test_sigterm_finishes_the_epoch_and_saves_it(
    failing: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer_of(failing("terminate", after=2, train={"epochs": 9})).run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.find(tmp_path / "run")[-1].name == "checkpoint-000002"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == [1, 2]


def test_outputs_do_not_move_if_a_reward_changes_the_working_directory(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    options = {"rewards_that_fail:Moves": {"to": str(tmp_path / "elsewhere")}}
    reward = {"weights": dict.fromkeys(options, 1.0), "options": options}
    trainer_of(configure(reward=reward, output={"folder": "run"})).run()
    assert {"checkpoint-000001", "final", "metrics.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_completed_epochs_are_saved_if_an_exception_ends_the_run(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    """Also between the updates of an epoch, when the weights belong to no completed epoch."""
    trainer = trainer_of(configure(train={"epochs": 3, "updates": 2}))
    step, steps, weights = trainer.updater.step, 0, dict[str, torch.Tensor]()

    def failing(*arguments: Any) -> Any:
        nonlocal steps, weights
        steps += 1
        if steps == 5:
            weights = {name: p.detach().clone() for name, p in trainer.average.parameters.items()}
        if steps == 6:
            raise error("no more")
        return step(*arguments)

    monkeypatch.setattr(trainer.updater, "step", failing)
    with pytest.raises(error, match="no more"):
        trainer.run()
    assert [path.name for path in checkpoint.find(tmp_path / "run")] == ["checkpoint-000002"]
    saved = load_file(tmp_path / "run" / "checkpoint-000002" / "weights.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in weights.items())


def test_completed_epochs_are_saved_as_soon_as_the_run_is_asked_to_end(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    """In the thread of the signals, before the current epoch ends, because the process may be killed earlier."""
    trainer = trainer_of(configure())
    trainer.train_epoch()
    trainer.saver.keep(trainer.epoch)
    trainer.saver.save_at_once("SIGTERM")
    assert [path.name for path in checkpoint.find(trainer.folder)] == ["checkpoint-000001"]
    assert f"Epoch 1 is saved in {trainer.folder}" in caplog.text
    assert "if the process is killed before, this epoch is lost" in caplog.text


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Returns a function that limits the size of files; writing more fails."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_that_keeps_earlier_checkpoints(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    file_size_limit: Callable[[int], None],
) -> None:
    trainer = trainer_of(configure(train={"epochs": 3}))
    trainer.train_epoch()
    trainer.saver.keep(trainer.epoch)
    trainer.saver.save()
    trainer.train_epoch()
    trainer.saver.keep(trainer.epoch)
    file_size_limit(2000)
    with pytest.raises(
        OSError, match=r"checkpoint-000002 cannot be written: .*I/O error.*it needs .* MB, .* MB are fr"
    ):
        trainer.saver.save()
    with pytest.raises(OSError, match=r"final cannot be written: .*I/O error"):
        trainer._export()
    assert [path.name for path in trainer.folder.glob("*checkpoint*")] == ["checkpoint-000001"]


def test_partial_files_of_a_killed_run_are_removed(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = tmp_path / "run" / ".checkpoint-000007.tmp"
    half.mkdir(parents=True)
    (half / "weights.safetensors").write_bytes(b"half")
    monkeypatch.setattr(module, "Policy", None)  # it would be constructed next
    with pytest.raises(TypeError):
        trainer_of(configure())
    assert not half.exists()


def test_a_resumed_run_makes_a_missing_evaluation(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure(evaluation={"every": 1}, output={"resume": True})
    killed = trainer_of(config)
    monkeypatch.setattr(killed, "_collect", interrupted_in_evaluation(killed._collect))
    with pytest.raises(KeyboardInterrupt):
        killed.run()

    def evaluated() -> list[int]:
        return [line["epoch"] for line in read_metrics(killed.folder) if line["event"] == "evaluation"]

    assert evaluated() == [0]
    resumed = trainer_of(config)
    resumed.run()
    assert evaluated() == [0, 1]
    resumed.record = Record(config, enabled=True, resumed_at=1)
    assert not resumed._lacks_evaluation()


def interrupted_in_evaluation(collect: Callable[..., Any]) -> Callable[..., Any]:
    """Raises KeyboardInterrupt in the second evaluation."""
    evaluations = 0

    def interrupted(waiting: Any, count: int, *phrases: int) -> Any:
        nonlocal evaluations
        evaluations += not phrases
        if evaluations == 2:
            raise KeyboardInterrupt
        return collect(waiting, count, *phrases)

    return interrupted


def test_a_folder_with_checkpoints_of_another_run_is_refused(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    trainer_of(configure()).run()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"contains checkpoint-000001 of another run: set output\.resume"):
        trainer_of(configure())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_only_the_latest_checkpoints_are_kept(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    trainer_of(configure(train={"epochs": 4}, output={"checkpoint_every": 1, "keep": 2})).run()
    assert [path.name for path in checkpoint.find(tmp_path / "run")] == ["checkpoint-000003", "checkpoint-000004"]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (torch.OutOfMemoryError("out of memory"), 1, r"out of memory\nResume .* smaller rollout\.batch"),
        (FloatingPointError("not finite"), 1, "star-train: error: not finite"),
        (KeyboardInterrupt(), 130, "^$"),
    ],
)
def test_the_command_reports_the_error_and_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, told: str
) -> None:
    def fail(config: Config) -> None:
        raise error

    monkeypatch.setattr(module, "Trainer", fail)
    assert command.main([]) == status
    assert re.search(told, capsys.readouterr().err)
