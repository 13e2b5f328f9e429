"""Clocks that time calls: wall-clock time, and device time on a GPU."""

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
    """One timed call.

    Attributes:
        seconds: duration of the call.
        waited: seconds for which threads of this process were ready to run while other processes used the processor.
    """

    seconds: float
    waited: float = 0.0

    @property
    def disturbed(self) -> bool:
        return self.waited > 0.01 * self.seconds


class Clock(Protocol):
    name: str

    def time(self, runs: Sequence[Callable[[], Any]]) -> list[Sample]:
        """Times each call and returns the samples in the same order."""


class CpuClock:
    """Wall-clock time by ``time.perf_counter``, Python included. A GPU is synchronised before and after each call.

    A sample is the mean over ``calls`` consecutive calls, between which a GPU is not synchronised.
    """

    def __init__(self, device: torch.device, calls: int = 1) -> None:
        self.device = device
        self.calls = calls
        self.name = "time.perf_counter" + (" between synchronisations" if device.type == "cuda" else "")

    def time(self, runs: Sequence[Callable[[], Any]]) -> list[Sample]:
        return [self._time(run) for run in runs]

    def _time(self, run: Callable[[], Any]) -> Sample:
        self._synchronise()
        waited = _waiting()
        start = time.perf_counter()
        for _ in range(self.calls):
            run()
        self._synchronise()
        seconds = time.perf_counter() - start
        return Sample(seconds / self.calls, (_waiting() - waited) / self.calls)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class CudaClock:
    """Device time by CUDA events around each call, with a cold L2 cache.

    The device sleeps while Python enqueues the call, so that the time does not include Python. A scratch buffer
    overwrites the L2 cache between the sleep and the call.
    """

    name = "CUDA events, L2 flushed before each launch, stream kept full"
    SLEEP_CYCLES = 4_000_000  # about 2 ms, more than Python needs to enqueue a variant

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
    """The clock for kernels: device time on a GPU, wall-clock time on a CPU."""
    return CudaClock(device) if device.type == "cuda" else CpuClock(device)


def _waiting() -> float:
    """Total seconds for which threads of this process were ready to run but had no processor. 0 except on Linux."""
    total = 0
    try:
        for task in TASKS.iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[1])
            except (OSError, IndexError):  # the thread has ended, or the kernel has no such statistics
                continue
    except OSError:
        return 0.0
    return total / 1e9
