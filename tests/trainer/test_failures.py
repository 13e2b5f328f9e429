"""What goes wrong in a run ends in the stated behaviour, and no finished epoch is lost."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rewards_that_fail
from safetensors.torch import save_file

from star_trainer import checkpoint
from star_trainer.config import Config
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


def test_stop_keeps_the_epochs_that_are_done(
    failing: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    """Two batches an epoch: the fifth call belongs to the third."""
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
def test_skip_trains_on_the_others(
    failing: Callable[..., Config], trainer_of: Callable[[Config], Trainer], how: str, skipped: int
) -> None:
    trainer = trainer_of(failing(how, on_failure="skip", after=1, rollout={"group_size": 4, "batch": 4}))
    with pytest.warns(RuntimeWarning, match="failing"):
        metrics = trainer.train_epoch()
    assert metrics["skipped"] == skipped
    assert 0 < metrics["reward"] < 1.5
    assert metrics["loss/grad_norm"] > 0


def test_no_reward_at_all_stops(failing: Callable[..., Config], trainer_of: Callable[[Config], Trainer]) -> None:
    trainer = trainer_of(failing("hang", on_failure="skip"))
    with (
        pytest.warns(RuntimeWarning, match="failing"),
        pytest.raises(RewardError, match="after epoch 0 all 4 samples are without a reward"),
    ):
        trainer.train_epoch()


def test_sigterm_finishes_the_epoch_and_saves_it(
    failing: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer_of(failing("terminate", after=2, train={"epochs": 9})).run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in checkpoint.find(tmp_path / "run")] == ["checkpoint-000002"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == [1, 2]


def test_a_full_disk_leaves_the_checkpoint_before(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = []

    def until_full(values: Any, path: Path) -> None:
        written.append(path)
        if len(written) > 4:  # the first's three files and the second's weights
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(values, path)

    monkeypatch.setattr(checkpoint, "save_file", until_full)
    with pytest.raises(OSError, match="No space left"):
        trainer_of(configure(train={"epochs": 3}, output={"checkpoint_every": 1})).run()
    assert [path.name for path in checkpoint.find(tmp_path / "run")] == ["checkpoint-000001"]
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    trainer = trainer_of(configure(train={"epochs": 3}, output={"checkpoint_every": 1, "resume": True}))
    assert trainer.epoch == 1
    trainer.run()
    assert [path.name for path in checkpoint.find(tmp_path / "run")] == ["checkpoint-000002", "checkpoint-000003"]


def test_another_runs_folder_is_refused(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    trainer_of(configure()).run()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"holds checkpoint-000001 of another run: set output\.resume"):
        trainer_of(configure())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("part", ["weights.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path, part: str
) -> None:
    trainer_of(configure()).run()
    path = tmp_path / "run" / "checkpoint-000001" / part
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="checkpoint-000001 cannot be read"):
        trainer_of(configure(train={"epochs": 2}, output={"resume": True}))


def test_only_so_many_checkpoints_stay(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    trainer_of(configure(train={"epochs": 4}, output={"checkpoint_every": 1, "keep": 2})).run()
    assert [path.name for path in checkpoint.find(tmp_path / "run")] == ["checkpoint-000003", "checkpoint-000004"]
