"""A thread that makes calls one after another, and can be left behind when one of them hangs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # the built-in one from Python 3.11 on
from typing import Any


class Hung(Exception):
    """A call took longer than its timeout and was abandoned."""


class Worker:
    """Calls functions in a daemon thread of its own; after a call that hangs, in a fresh one.

    Python cannot stop a thread: an abandoned one ends when its call returns, and the answer is dropped.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] | None = None

    def call(self, function: Callable[[], Any], timeout: float) -> Any:
        """What the function returns or raises.

        Raises:
            Hung: there is no answer after ``timeout`` seconds.
        """
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls,), name=self._name, daemon=True).start()
        answer: Future[Any] = Future()
        self._calls.put((function, answer))
        try:
            error = answer.exception(timeout)
        except FutureTimeout:
            self.leave()
            raise Hung(f"no answer after {timeout:g} s") from None
        if error is not None:
            raise error
        return answer.result()

    def leave(self) -> None:
        """Lets the thread end after the call it is in; the next call starts a fresh one."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None


def _serve(calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]) -> None:
    while (item := calls.get()) is not None:
        function, answer = item
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)
        del item, function, answer  # an idle thread holds no images
