"""One run in a folder: a lock that the system lets go when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from pathlib import Path
from typing import IO

NAME = ".lock"
# By process and folder. A lock belongs to the process: a fork does not have its parent's, and a second trainer of one
# process, as in a notebook, takes over. Closing any handle of the file would let the lock go, so there is only one.
_held: dict[tuple[int, str], IO[str]] = {}


def lock(folder: Path) -> None:
    """Makes the folder and keeps other processes out of it, until :func:`unlock` or the end of this process.

    Warns (RuntimeWarning) where the file system has no locks.

    Raises:
        ValueError: the folder is in use by another process.
    """
    key = _key(folder)
    if key in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / NAME).open("a+")  # not truncated: it says who holds the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ValueError(
            f"output.folder {folder} is in use by another run ({holder}): wait for its end, or choose another folder"
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
    """Lets other processes in; nothing where the folder is not locked by this process."""
    if file := _held.pop(_key(folder), None):
        file.close()


def _key(folder: Path) -> tuple[int, str]:
    return os.getpid(), os.path.realpath(folder)
