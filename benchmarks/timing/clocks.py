"""How a call is timed: on a CPU, on a GPU, and on the wall."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Sample:
    """One timed call: its seconds, and for how many of them our threads waited while others had the processor."""

    seconds: float
    waited: float = 0.0

    @property
    def disturbed(self) -> bool:
        return self.waited > 0.01 * self.seconds


class Clock(Protocol):
    name: str

    def time(self, runs: Sequence[Callable[[], Any]]) -> list[Sample]:
        """A sample for each call, in the order given."""


class CpuClock:
    """``time.perf_counter``, with the device idle at both ends if there is one: what a user waits, Python included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = "time.perf_counter" + (" between synchronisations" if device.type == "cuda" else "")

    def time(self, runs: Sequence[Callable[[], Any]]) -> list[Sample]:
        return [self._time(run) for run in runs]

    def _time(self, run: Callable[[], Any]) -> Sample:
        self._synchronise()
        waited = _waiting()
        start = time.perf_counter()
        run()
        self._synchronise()
        seconds = time.perf_counter() - start
        return Sample(seconds, _waiting() - waited)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class CudaClock:
    """CUDA events around each launch, with a cold L2 and a stream that never waits for Python.

    The device sleeps before each launch while Python enqueues it, so a figure is the device's time. The scratch buffer
    overwrites the L2 between sleep and launch.
    """

    name = "CUDA events, L2 flushed before each launch, stream kept full"
    SLEEP_CYCLES = 4_000_000  # about 2 ms: more than Python takes to enqueue any variant

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = max(64 << 20, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def time(self, runs: Sequence[Callable[[], Any]]) -> list[Sample]:
        events = []
        for run in runs:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self.SLEEP_CYCLES)
            self.scratch.zero_()
            start.record()
            run()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize(self.device)
        return [Sample(start.elapsed_time(stop) / 1e3) for start, stop in events]


def kernel_clock(device: torch.device) -> Clock:
    """The clock for a kernel: the device's own time on a GPU."""
    return CudaClock(device) if device.type == "cuda" else CpuClock(device)


def _waiting() -> float:
    """Seconds that this process's threads have been ready to run without a processor (Linux; 0 elsewhere)."""
    total = 0
    try:
        for task in TASKS.iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
            except (OSError, IndexError):  # the thread has just ended, or the kernel keeps no such statistics
                continue
    except OSError:
        return 0.0
    return total / 1e9
