"""Detects requests to end a run: signals, and the exit of the launcher that started it."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger("star_trainer")

# Batch systems send the last three before they kill a job.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
CAUGHT = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
ECHO = 2.0  # seconds within which torchrun forwards a Ctrl-C that its processes already received from the terminal
LOOK = 1.0  # seconds between checks for the launcher
_catching: list[Signals] = []  # instances within their context
_masks = threading.local()


class Signals:
    """Catches signals within the context and calls ``callback`` once, with a description of the first request.

    The callback runs immediately in a thread of its own, even while the main thread waits within C++ (for another
    process, or for the device). A second Ctrl-C ends the process immediately. Signals that were ignored before (nohup)
    stay ignored. Outside the main thread no signal is caught.

    Attributes:
        stopped: whether the run was asked to end.
    """

    def __init__(self, callback: Callable[[str], object]) -> None:
        self.stopped = False
        self._callback, self._called = callback, False
        self._threads: list[threading.Thread] = []
        self._previous: dict[int, Any] = {}
        self._wakeup: int | None = None
        self._launcher = os.getppid() if launched() else None

    def __enter__(self) -> Signals:
        self._end, end = os.pipe()
        self._write = end
        os.set_blocking(end, False)
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._stop)
                for number in CAUGHT
                if signal.getsignal(number) not in (signal.SIG_IGN, None)
            }
            self._wakeup = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
            _catching.append(self)
        self._start(self._watch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup)
            _catching.remove(self)
        os.write(self._write, b"\0")
        for thread in self._threads:  # the watching thread, then those that it started
            thread.join()
        os.close(self._end)
        os.close(self._write)

    def let_go(self) -> None:
        """Restores the handlers in a forked process, for example of a reward's pool: its signals do not end the run.

        Ctrl-C is ignored there: the terminal sends it to all processes, and the run needs the pool to finish its epoch.
        """
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """The handler that Python calls in the main thread, after it returns from C++; it may interrupt any code."""
        self.stopped = True

    def _watch(self) -> None:
        interrupted: float | None = None
        while True:
            if select.select([self._end], [], [], LOOK)[0]:
                numbers = os.read(self._end, 64)
            else:
                numbers = b""
                if self._launcher is not None and os.getppid() != self._launcher:
                    self._launcher = None
                    self._tell("the launcher has exited")
            for number in numbers:
                if not number:
                    return
                if number not in self._previous:  # belongs to another handler
                    continue
                now = time.monotonic()
                if number == signal.SIGINT and interrupted is not None:
                    if not (by_torchrun() and now - interrupted < ECHO):
                        log.warning("second Ctrl-C: the run ends now")
                        os._exit(128 + number)
                elif number == signal.SIGINT:
                    interrupted = now
                self._tell(signal.Signals(number).name)

    def _tell(self, reason: str) -> None:
        self.stopped = True
        if not self._called:
            self._called = True
            self._start(self._callback, reason)

    def _start(self, function: Callable[..., object], *arguments: str) -> None:
        thread = threading.Thread(target=function, args=arguments, name="signals", daemon=True)
        self._threads.append(thread)
        thread.start()


def _before_fork() -> None:
    """Blocks signals until the child has restored its handlers, for example those of a pool that terminates at once."""
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT if _catching else ())


def _unmask() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _forked() -> None:
    while _catching:
        _catching.pop().let_go()
    _unmask()


os.register_at_fork(before=_before_fork, after_in_parent=_unmask, after_in_child=_forked)


def launched() -> bool:
    """Whether accelerate's launcher or torchrun is the parent process; the run ends when it exits."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or by_torchrun()


def by_torchrun() -> bool:
    """Whether torchrun started this process, directly or through accelerate's launcher for several processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ
