"""What asks a run to end: a signal, or the end of the launcher that started it."""

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

# The last three are what batch systems send before they kill.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
CAUGHT = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
ECHO = 2.0  # seconds within which torchrun passes on a Ctrl-C that its processes have from the terminal already
LOOK = 1.0  # seconds between looks for the launcher
_catching: list[Signals] = []  # those whose context lasts
_masks = threading.local()


class Signals:
    """Catches signals while the context lasts, and calls ``told`` once, with a name for the first one.

    A thread of its own calls it, at once, even while the main thread waits within C++ (for another process, or for the
    device). A second Ctrl-C ends the process on the spot. Signals that were ignored (nohup) stay ignored. Outside the
    main thread nothing is caught.

    Attributes:
        stopped: whether the run was asked to end.
    """

    def __init__(self, told: Callable[[str], object]) -> None:
        self.stopped = False
        self._told, self._called = told, False
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
        for thread in self._threads:  # the watch, then what it has started
            thread.join()
        os.close(self._end)
        os.close(self._write)

    def let_go(self) -> None:
        """In a forked process, as of a reward's pool: its signals are its own, and not told to the run.

        A terminal's Ctrl-C reaches it too, but the epoch that the run then finishes needs it.
        """
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, in the main thread, as soon as that is back from C++; it may interrupt anything."""
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
                    self._tell("the launcher has ended")
            for number in numbers:
                if not number:
                    return
                if number not in self._previous:  # of a handler that is not this one's
                    continue
                now = time.monotonic()
                if number == signal.SIGINT and interrupted is not None:
                    if not (by_torchrun() and now - interrupted < ECHO):
                        log.warning("a second Ctrl-C: the run ends here")
                        os._exit(128 + number)
                elif number == signal.SIGINT:
                    interrupted = now
                self._tell(signal.Signals(number).name)

    def _tell(self, reason: str) -> None:
        self.stopped = True
        if not self._called:
            self._called = True
            self._start(self._told, reason)

    def _start(self, function: Callable[..., object], *arguments: str) -> None:
        thread = threading.Thread(target=function, args=arguments, name="signals", daemon=True)
        self._threads.append(thread)
        thread.start()


def _before_fork() -> None:
    """What comes for the child, as from a pool that ends at once, waits until that has let go."""
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT if _catching else ())


def _unmask() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _forked() -> None:
    while _catching:
        _catching.pop().let_go()
    _unmask()


os.register_at_fork(before=_before_fork, after_in_parent=_unmask, after_in_child=_forked)


def launched() -> bool:
    """Whether a launcher, accelerate's or torchrun, is the parent: its end is to be the run's."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or by_torchrun()


def by_torchrun() -> bool:
    """Whether torchrun, or accelerate's launcher of several processes, started this one."""
    return "TORCHELASTIC_RUN_ID" in os.environ
