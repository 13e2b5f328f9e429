"""The folder of what tests compile. With STAR_KERNELS_BUILD it is kept, and only what changed is compiled again."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def build_folder(name: str, factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that no other process uses meanwhile; without STAR_KERNELS_BUILD, one for all processes of the tests."""
    kept = os.environ.get("STAR_KERNELS_BUILD")
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = (Path(kept).resolve() if kept else shared) / name
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def write(path: Path, text: str) -> None:
    """Writes a file if it does not have this text already: its time does not change then."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
