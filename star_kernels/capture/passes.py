"""The forward pass that a capture records, and the thread or asyncio task that runs it.

A capture records one thread at a time: attention modules hand their maps to the pass that is open, and the next pass
replaces the maps of the one before. Beginning a pass while another thread's is open is therefore an error, and so is
reading maps that another thread's or another task's pass has replaced.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from star_kernels.selection import TokenSelection
from star_kernels.torch_internals import in_backward


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
        self.outside: set[str] = set()  # captured modules that ran outside a pass, since the latest one
        self.nested = False  # the latest pass began while another was open in this thread
        self._thread: threading.Thread | None = None  # of the latest captured pass
        self._caller: Any = None  # that thread, or the asyncio task that ran the pass
        self._callers: WeakSet[Any] = WeakSet()  # all that have run a captured pass
        self._was_open = False
        self._recomputed = threading.local()

    def reset(self) -> None:
        """Called before every forward pass; no pass is current until :meth:`begin`."""
        thread = self._thread
        if self.open and thread is not None and thread.is_alive() and thread is not threading.current_thread():
            raise RuntimeError(
                f"transformer runs a captured pass in another thread ({thread.name}), and a capture records one thread "
                "at a time: give each thread a copy of the model with its own capture, or call the model under a lock"
            )
        self._was_open, self.nested = self.open, False
        self.current, self.open = None, False

    def begin(self, current: ForwardPass) -> None:
        self.current, self.open = current, True
        self.nested = self._was_open  # also if the other pass was interrupted: then it never ends
        self.outside = set()
        self._thread, self._caller = threading.current_thread(), _caller()
        self._callers.add(self._caller)

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

    def ran_outside(self, name: str) -> None:
        """Called when a captured module runs although no pass is open, unless it is recomputed for the backward pass:
        the hooks of the model did not see the call."""
        if getattr(self._recomputed, "current", None) is None and not in_backward():
            self.outside.add(name)

    @contextmanager
    def recompute(self, forward_pass: ForwardPass) -> Iterator[None]:
        """Context in which this thread recomputes a block of a pass, whichever pass other threads run."""
        before, self._recomputed.current = getattr(self._recomputed, "current", None), forward_pass
        try:
            yield
        finally:
            self._recomputed.current = before

    def check_reader(self) -> None:
        """Raises if this thread or task has run captured passes, but the latest was another's."""
        caller = _caller()
        if self._caller is None or self._caller is caller or caller not in self._callers:
            return
        is_thread = isinstance(self._caller, threading.Thread)
        kind, other = ("thread", self._caller.name) if is_thread else ("task", self._caller.get_name())
        raise RuntimeError(
            f"the latest captured pass ran in another {kind} ({other}), and the maps of this {kind}'s pass are gone: "
            f"give each {kind} a copy of the model with its own capture, or hold a lock from the call of the model "
            "until its maps are read"
        )


def _caller() -> Any:
    """The asyncio task that runs, or else the thread."""
    asyncio = sys.modules.get("asyncio")
    try:
        task = None if asyncio is None else asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.current_thread() if task is None else task
