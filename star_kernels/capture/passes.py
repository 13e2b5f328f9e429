"""The forward pass that a capture follows, and in which thread it runs.

A capture belongs to one thread at a time: blocks hand their maps to the pass that is open, and a second pass replaces
the maps of the first. So a pass that begins in another thread meanwhile is an error, and so is reading maps after
another thread's pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

from star_kernels.selection import TokenSelection


@dataclass(frozen=True)
class Pass:
    """What one forward pass captures."""

    selection: TokenSelection  # for every sample of the batch
    expected: str  # how the batch must relate to the user's selection, for the error
    rows: tuple[int, int] | None
    gradients: bool  # were enabled when the pass began


class Passes:
    """The running forward pass, shared by the blocks."""

    def __init__(self) -> None:
        self.current: Pass | None = None  # stays after the pass, for a checkpointed block that is computed again
        self.open = False  # maps are taken; not so when a block is computed again
        self._thread: threading.Thread | None = None  # of the latest captured pass
        self._seen: WeakSet[threading.Thread] = WeakSet()  # threads that have run a captured pass
        self._again = threading.local()

    def clear(self) -> None:
        """A pass begins; none is current until :meth:`begin`."""
        thread = self._thread
        if self.open and thread is not None and thread.is_alive() and thread is not threading.current_thread():
            raise RuntimeError(
                f"transformer runs a captured pass in another thread ({thread.name}): a capture follows one thread at "
                "a time; give each thread a copy of the model with a capture of its own, or call it under a lock"
            )
        self.current, self.open = None, False

    def begin(self, current: Pass) -> None:
        self.current, self.open = current, True
        self._thread = threading.current_thread()
        self._seen.add(self._thread)

    def end(self) -> bool:
        """Closes the pass that is open in this thread; False where none is."""
        if not self.open or self._thread is not threading.current_thread():
            return False
        self.open = False
        return True

    def takes(self, current: Pass) -> bool:
        """Whether the pass is the open one: not so when one of its blocks is computed again later."""
        return self.open and current is self.current

    def of_this_thread(self) -> Pass | None:
        """What a block that runs in this thread captures."""
        again: Pass | None = getattr(self._again, "current", None)
        if again is not None:
            return again
        if self.open and self._thread is not threading.current_thread():
            return None
        return self.current

    @contextmanager
    def again(self, current: Pass) -> Iterator[None]:
        """A block of a pass is computed again, in this thread, whatever the others do."""
        before, self._again.current = getattr(self._again, "current", None), current
        try:
            yield
        finally:
            self._again.current = before

    def check_reader(self) -> None:
        """The maps at hand must not be another thread's, where this one has run passes too."""
        me = threading.current_thread()
        if self._thread is not None and self._thread is not me and me in self._seen:
            raise RuntimeError(
                f"the latest captured pass ran in another thread ({self._thread.name}), so that the maps of this "
                "thread's pass are gone: give each thread a copy of the model with a capture of its own, or hold a "
                "lock from the call of the model until its maps are read"
            )
