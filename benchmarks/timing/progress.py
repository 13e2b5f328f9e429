"""What runs and how long it all still takes: a bar on a terminal, a line for each comparison elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm


class Plan:
    """The parts of a run in order, with the seconds that each is expected to take."""

    def __init__(self, parts: Mapping[str, float]) -> None:
        self.parts = dict(parts)
        self.current = ""
        self.began = time.perf_counter()

    def begin(self, part: str) -> None:
        self.current, self.began = part, time.perf_counter()

    @property
    def place(self) -> str:
        """Such as ``[2/4]``."""
        return f"[{list(self.parts).index(self.current) + 1}/{len(self.parts)}]" if self.current else ""

    @property
    def left(self) -> float:
        """Seconds, of this part and of those after it."""
        names = list(self.parts)
        after = names[names.index(self.current) + 1 :] if self.current else names
        now = self.parts[self.current] - (time.perf_counter() - self.began) if self.current else 0.0
        return max(0.0, now) + sum(self.parts[name] for name in after)


_plan: Plan | None = None  # of the run in this process


def follow(plan: Plan | None) -> None:
    """Has every progress bar from now on tell its place in the plan."""
    global _plan
    _plan = plan


def duration(seconds: float) -> str:
    """Such as ``about 2 min``; empty where it is not known."""
    if not math.isfinite(seconds):
        return ""
    return (
        f"about {max(1, round(seconds / 60))} min" if seconds >= 50 else f"about {10 * max(1, round(seconds / 10))} s"
    )


class Progress:
    """Of one comparison: a bar in seconds of its budget."""

    def __init__(self, title: str, seconds: float) -> None:
        self.title = title
        self.bar = tqdm(
            total=_total(seconds),
            desc=self._told(""),
            leave=False,
            disable=None,
            ncols=100,
            nrows=20,  # terminals that do not know their height would show nothing
            bar_format="{desc} |{bar}|",
        )
        if self.bar.disable:
            place, left = _whereabouts()
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
            self.bar.set_description_str(self._told(what))

    def _told(self, what: str) -> str:
        place, left = _whereabouts()
        return f"{place}{left and left + ' · '}{self.title}{what and ': ' + what}"[:80]

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *unused: object) -> None:
        self.bar.close()


def _whereabouts() -> tuple[str, str]:
    """The place in the plan and the time left, both empty without a plan."""
    if _plan is None:
        return "", ""
    left = duration(_plan.left)
    return f"{_plan.place} ", f"{left} left" if left else ""


def _total(seconds: float) -> int | None:
    return max(1, round(seconds)) if math.isfinite(seconds) else None
