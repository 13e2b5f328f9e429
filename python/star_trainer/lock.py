"""Locks the folder of a run; the operating system releases the lock when the process ends for any reason."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from pathlib import Path
from typing import IO

NAME = ".lock"
# By process and folder. A lock belongs to a process: a fork does not inherit it, and a second trainer in the same
# process, as in a notebook, reuses it. Closing any handle of the file would release the lock, so there is only one.
_held: dict[tuple[int, str], IO[str]] = {}


def lock(folder: Path) -> None:
    """Creates the folder and locks it against other processes until :func:`unlock` or the end of this process.

    Warns:
        RuntimeWarning: the file system does not support locks.

    Raises:
        ValueError: another process uses the folder.
    """
    key = _key(folder)
    if key in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / NAME).open("a+")  # not truncated: it names the process that holds the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ValueError(
            f"output.folder {folder} is in use by another run ({holder}): wait until it ends, or choose another folder"
        ) from None
    except OSError as error:
        file.close()
        warnings.warn(
            f"output.folder {folder} cannot be locked ({error}): make sure that no other run writes to it",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[key] = file


def unlock(folder: Path) -> None:
    """Releases the lock; does nothing if this process has not locked the folder."""
    if file := _held.pop(_key(folder), None):
        file.close()


def _key(folder: Path) -> tuple[int, str]:
    return os.getpid(), os.path.realpath(folder)
