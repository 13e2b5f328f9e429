"""Saves the latest completed epoch of a run, at regular intervals and when the run ends."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from star_trainer import checkpoint
from star_trainer.signals import by_torchrun

log = logging.getLogger("star_trainer")


class Saver:
    """Keeps a copy of the state after the latest epoch, from which a checkpoint can be written at any moment.

    While an epoch is in progress the weights belong to no completed epoch, and gathering sharded weights would need all
    processes.

    Args:
        live: the objects of the run.
        folder: where checkpoints are written.
        count: how many checkpoints are kept.

    Attributes:
        saved: epoch of the latest checkpoint; 0 if there is none.
    """

    def __init__(self, live: checkpoint.Live, folder: Path, count: int) -> None:
        self.live, self.folder, self.count = live, folder, count
        self.saved = 0
        self._kept: checkpoint.Snapshot | None = None  # None if it is already saved
        self._lock = threading.Lock()  # held while the snapshot is replaced or written

    def keep(self, epoch: int) -> None:
        """Copies the state after an epoch to main memory of the first process. All processes must call it."""
        snapshot = checkpoint.take(self.live, epoch)
        with self._lock:
            self._kept = snapshot

    def save(self) -> None:
        """Writes the kept state. All processes must call it."""
        self._write()
        self.live.accelerator.wait_for_everyone()

    def rescue(self) -> None:
        """Writes the kept state while an exception ends the run, without the other processes."""
        try:
            self._write()
        except Exception as error:
            log.error("epochs after %d are lost: %s", self.saved, error)

    def save_at_once(self, reason: str) -> None:
        """Writes the kept state as soon as the run is asked to end, in a thread of its own."""
        if not self.live.accelerator.is_main_process:
            return
        log.warning("%s: the run ends after this epoch", reason)
        self.rescue()
        log.warning(
            "%s. The current epoch will be finished and saved, too%s; if the process is killed before, this epoch is "
            "lost. A second Ctrl-C ends the run immediately",
            f"Epoch {self.saved} is saved in {self.folder}" if self.saved else "No epoch is completed yet",
            " (torchrun kills its processes after 30 s)" if by_torchrun() else "",
        )

    def _write(self) -> None:
        with self._lock:
            kept, self._kept = self._kept, None  # a failed write is not repeated
            if kept is not None:
                checkpoint.write(kept, self.folder, self.count)
                self.saved = kept.epoch
