"""Progress of a run: a progress bar on a terminal, otherwise a line for each comparison."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm


class Plan:
    """The parts of a run in order, with the expected duration of each in seconds."""

    def __init__(self, parts: Mapping[str, float]) -> None:
        self.parts = dict(parts)
        self.current = ""
        self.began = time.perf_counter()

    def begin(self, part: str) -> None:
        self.current, self.began = part, time.perf_counter()

    @property
    def place(self) -> str:
        """The number of the current part, such as ``[2/4]``."""
        return f"[{list(self.parts).index(self.current) + 1}/{len(self.parts)}]" if self.current else ""

    @property
    def left(self) -> float:
        """Expected seconds until the end of the run."""
        names = list(self.parts)
        after = names[names.index(self.current) + 1 :] if self.current else names
        now = self.parts[self.current] - (time.perf_counter() - self.began) if self.current else 0.0
        return max(0.0, now) + sum(self.parts[name] for name in after)


_plan: Plan | None = None  # the plan of the run in this process


def set_plan(plan: Plan | None) -> None:
    """Sets the plan whose current part and remaining time every progress bar shows."""
    global _plan
    _plan = plan


def duration(seconds: float) -> str:
    """A rounded duration, such as ``about 2 min``; empty if it is not finite."""
    if not math.isfinite(seconds):
        return ""
    return (
        f"about {max(1, round(seconds / 60))} min" if seconds >= 50 else f"about {10 * max(1, round(seconds / 10))} s"
    )


class Progress:
    """The progress bar of one comparison, in seconds of its budget."""

    def __init__(self, title: str, seconds: float) -> None:
        self.title = title
        self.bar = tqdm(
            total=_total(seconds),
            desc=self._description(""),
            leave=False,
            disable=None,
            ncols=100,
            nrows=20,  # without it, terminals that do not report their height show no bar
            bar_format="{desc} |{bar}|",
        )
        if self.bar.disable:
            place, left = _place_and_time_left()
            print(f"{place}{title} ...{left and ' ' + left}", file=sys.stderr, flush=True)
        self.start = time.perf_counter()

    def restart(self, seconds: float) -> None:
        self.start = time.perf_counter()
        self.bar.total = _total(seconds)

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def show(self, what: str) -> None:
        if not self.bar.disable:
            self.bar.n = min(round(self.elapsed()), self.bar.total or sys.maxsize)
            self.bar.set_description_str(self._description(what))

    def _description(self, what: str) -> str:
        place, left = _place_and_time_left()
        return f"{place}{left and left + ' · '}{self.title}{what and ': ' + what}"[:80]

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *unused: object) -> None:
        self.bar.close()


def _place_and_time_left() -> tuple[str, str]:
    """The place in the plan and the time left, both empty if there is no plan."""
    if _plan is None:
        return "", ""
    left = duration(_plan.left)
    return f"{_plan.place} ", f"{left} left" if left else ""


def _total(seconds: float) -> int | None:
    return max(1, round(seconds)) if math.isfinite(seconds) else None
