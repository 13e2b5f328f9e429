"""Only one run at a time can use a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kill_points import in_child

from star_trainer import trainer
from star_trainer.config import Config
from star_trainer.lock import lock, unlock
from star_trainer.trainer import Trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def refused(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"output\.folder {folder} is in use by another run \(process {os.getppid()} "
    ):
        lock(folder)


def test_another_process_is_refused_until_the_folder_is_unlocked(tmp_path: Path) -> None:
    lock(tmp_path)
    lock(tmp_path)  # the same process may
    assert in_child(lambda: refused(tmp_path)) == 0
    unlock(tmp_path)
    assert in_child(lambda: lock(tmp_path)) == 0


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    def killed() -> None:
        lock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == signal.SIGKILL
    lock(tmp_path)
    unlock(tmp_path)


def test_a_fork_does_not_keep_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    """For example the workers of a reward, which may outlive the run."""
    held, let_go = os.pipe()

    def killed() -> None:
        lock(tmp_path)
        if os.fork() == 0:
            os.close(let_go)
            os.read(held, 1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == signal.SIGKILL
    lock(tmp_path)
    unlock(tmp_path)
    os.close(let_go)
    os.close(held)


def test_a_file_system_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.warns(RuntimeWarning, match=r"cannot be locked \(.*No locks available\)"):
        lock(tmp_path)


def test_a_run_is_refused_before_its_model_is_loaded(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(output={"resume": True})
    folder = Path(config.output.folder)
    lock(folder)
    (folder / "metrics.jsonl").write_text("of the first run")
    monkeypatch.setattr(trainer, "Policy", None)

    def second() -> None:
        with pytest.raises(ValueError, match="in use by another run"):
            trainer_of(config)

    assert in_child(second) == 0
    assert (folder / "metrics.jsonl").read_text() == "of the first run"
    unlock(folder)


def test_the_end_of_a_run_unlocks_its_folder(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("at once")

    made = trainer_of(configure())
    assert in_child(lambda: refused(made.folder)) == 0
    monkeypatch.setattr(made, "train_epoch", fail)
    with pytest.raises(RuntimeError, match="at once"):
        made.run()
    assert in_child(lambda: lock(made.folder)) == 0
