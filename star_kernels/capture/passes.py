"""The forward pass that a capture records, and the thread that runs it.

A capture records one thread at a time: attention modules hand their maps to the pass that is open, and the next pass
replaces the maps of the one before. Beginning a pass while another thread's is open is therefore an error, and so is
reading maps that another thread's pass has replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

from star_kernels.selection import TokenSelection


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass captures."""

    selection: TokenSelection  # for every sample of the batch
    expected: str  # how the batch must relate to the user's selection, for the error message
    rows: tuple[int, int] | None
    grad_enabled: bool  # when the pass began
    detached: int = 0  # the number of blocks whose maps are detached
    keys: int | None = None  # of the attention call with the text


class Passes:
    """The running forward pass, shared by all captured attention modules."""

    def __init__(self) -> None:
        self.current: ForwardPass | None = None  # kept after the pass, for checkpointed blocks that are recomputed
        self.open = False  # whether maps are recorded: not while a checkpointed block is recomputed
        self._thread: threading.Thread | None = None  # of the latest captured pass
        self._threads: WeakSet[threading.Thread] = WeakSet()  # all that have run a captured pass
        self._recomputed = threading.local()

    def reset(self) -> None:
        """Called before every forward pass; no pass is current until :meth:`begin`."""
        thread = self._thread
        if self.open and thread is not None and thread.is_alive() and thread is not threading.current_thread():
            raise RuntimeError(
                f"transformer runs a captured pass in another thread ({thread.name}), and a capture records one thread "
                "at a time: give each thread a copy of the model with its own capture, or call the model under a lock"
            )
        self.current, self.open = None, False

    def begin(self, current: ForwardPass) -> None:
        self.current, self.open = current, True
        self._thread = threading.current_thread()
        self._threads.add(self._thread)

    def end(self) -> bool:
        """Closes the pass that is open in this thread; False if there is none."""
        if not self.open or self._thread is not threading.current_thread():
            return False
        self.open = False
        return True

    def is_open(self, forward_pass: ForwardPass) -> bool:
        """Whether the pass is running: False while one of its checkpointed blocks is recomputed later."""
        return self.open and forward_pass is self.current

    def in_this_thread(self) -> ForwardPass | None:
        """The pass that attention modules of this thread belong to."""
        recomputed: ForwardPass | None = getattr(self._recomputed, "current", None)
        if recomputed is not None:
            return recomputed
        if self.open and self._thread is not threading.current_thread():
            return None
        return self.current

    @contextmanager
    def recompute(self, forward_pass: ForwardPass) -> Iterator[None]:
        """Context in which this thread recomputes a block of a pass, whichever pass other threads run."""
        before, self._recomputed.current = getattr(self._recomputed, "current", None), forward_pass
        try:
            yield
        finally:
            self._recomputed.current = before

    def check_reader(self) -> None:
        """Raises if this thread has run captured passes, but the latest was another thread's."""
        thread = threading.current_thread()
        if self._thread is not None and self._thread is not thread and thread in self._threads:
            raise RuntimeError(
                f"the latest captured pass ran in another thread ({self._thread.name}), and the maps of this thread's "
                "pass are gone: give each thread a copy of the model with its own capture, or hold a lock from the "
                "call of the model until its maps are read"
            )
