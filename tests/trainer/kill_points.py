"""Runs a configuration repeatedly, kills it at a different point each time, and resumes it.

``kill_points.py CONFIG.yaml FOLDER POINTS``: for each point a process is killed (SIGKILL) just before its n-th call of
a function that advances a run (a rollout, an optimiser step, each step of writing a checkpoint). Afterwards all
checkpoints must be readable, and the resumed run must equal the uninterrupted run bit for bit.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from star_trainer import checkpoint, record, trainer, update
from star_trainer.command import parse
from star_trainer.config import Config
from star_trainer.restore import restore
from star_trainer.trainer import Trainer

# Functions before which a process may be killed: an object and the name of the function.
PLACES: tuple[tuple[Any, str], ...] = (
    (trainer, "roll_out"),
    (update.Updater, "step"),
    (record.Record, "metrics"),
    (checkpoint, "save_file"),
    (checkpoint, "_flush"),
    (Path, "rename"),
    (shutil, "rmtree"),
    (Path, "write_text"),
)


def main(path: str, folder: str, points: int) -> None:
    config = parse(["--config", path])
    whole = replace(config, output=replace(config.output, folder=f"{folder}/whole"))
    calls = Path(folder) / "calls"
    assert in_child(partial(counted, whole, calls)) == 0, "the run without a kill failed"
    total = int(calls.read_text())
    expected = final_weights(whole)
    chosen = sorted({1 + round(n * (total - 1) / max(1, points - 1)) for n in range(points)})
    for point in chosen:
        killed = replace(config, output=replace(config.output, folder=f"{folder}/{point}"))
        status = in_child(partial(run, killed, point))
        assert status == signal.SIGKILL, f"point {point} of {total}: status {status}"
        assert in_child(partial(check, killed)) == 0, f"point {point}: a checkpoint is damaged, or too much is lost"
        resumed = replace(killed, output=replace(killed.output, resume=True))
        assert in_child(partial(run, resumed, None)) == 0, f"point {point}: the resumed run failed"
        assert final_weights(killed) == expected, f"point {point}: the resumed run is another one"
        shutil.rmtree(killed.output.folder)
    print(f"{len(chosen)} points of {total}")


def in_child(function: Callable[[], object]) -> int:
    """Runs the function in a fork. Returns 0, 1 for an exception, or the signal that ended the fork."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def run(config: Config, kill_at: int | None) -> int:
    """Trains. Returns the number of counted calls."""
    count = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for place, name in PLACES:
        setattr(place, name, counting(getattr(place, name)))
    Trainer(config, Accelerator(cpu=True), progress=False).run()
    return count


def counted(config: Config, path: Path) -> None:
    count = run(config, None)
    with path.open("w") as file:  # not Path.write_text, which is in PLACES
        file.write(str(count))


def check(config: Config) -> None:
    """Checks that all checkpoints but the last can be restored (the resumed run restores that one), and that the last
    checkpoint is of the last or the second-last epoch."""
    found = checkpoint.find(Path(config.output.folder))
    for path in found[:-1]:
        made = Trainer(
            replace(config, output=replace(config.output, folder=f"{config.output.folder}-none")),
            Accelerator(cpu=True),
            progress=False,
        )
        restore(path, made.saver.live)
    done = [line["epoch"] for line in record.read_metrics(Path(config.output.folder)) if line["event"] == "epoch"]
    last = int(found[-1].name.split("-")[1]) if found else 0
    assert last >= max(done, default=0) - 1, (last, done)


def final_weights(config: Config) -> bytes:
    last = checkpoint.find(Path(config.output.folder))[-1]
    return b"".join((last / f"{name}.safetensors").read_bytes() for name in ("weights", "optimizer", "average"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
