"""A thread that makes calls one after another and can be abandoned if a call hangs."""

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
    """Calls functions in a daemon thread, and in a new one after a call that hangs.

    Python cannot stop a thread: an abandoned thread ends when its call returns, and the result is discarded.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] | None = None

    def call(self, function: Callable[[], Any], timeout: float) -> Any:
        """Returns the result of the function, or raises its exception.

        Raises:
            Hung: there is no result after ``timeout`` seconds.
        """
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            threading.Thread(target=_run, args=(self._calls,), name=self._name, daemon=True).start()
        answer: Future[Any] = Future()
        self._calls.put((function, answer))
        try:
            error = answer.exception(timeout)
        except FutureTimeout:
            self.leave()
            raise Hung(f"no result after {timeout:g} s") from None
        if error is not None:
            raise error
        return answer.result()

    def leave(self) -> None:
        """Ends the thread after its current call; the next call starts a new thread."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None


def _run(calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]) -> None:
    while (item := calls.get()) is not None:
        function, answer = item
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)
        del item, function, answer  # an idle thread keeps no images
