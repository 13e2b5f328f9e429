"""The captures that are attached to a model, so that one whose handle is lost can be found and removed."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakSet

_captures: WeakSet[Any] = WeakSet()  # a model's hooks keep its captures alive, and this set keeps nothing alive
_lock = threading.Lock()


def add(capture: Any) -> None:
    with _lock:
        _captures.add(capture)


def discard(capture: Any) -> None:
    with _lock:
        _captures.discard(capture)


def captures() -> list[Any]:
    """All captures that were added and neither removed nor freed."""
    with _lock:
        return list(_captures)
