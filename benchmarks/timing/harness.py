"""Timing and statistics: variants interleaved launch by launch, figures as medians, ratios paired by round."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from benchmarks.timing.clocks import Clock, CudaClock, Sample
from benchmarks.timing.progress import Progress

Extent = Literal["quick", "default", "thorough"]  # tiny shapes for tests; minutes; what results are published from


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a comparison; ``share`` below 1 lets a slow one sit out most rounds."""

    name: str
    label: str
    run: Callable[[], Any]
    share: float = 1.0


@dataclass(frozen=True)
class Budget:
    """How long a comparison may go on: at least two rounds, at most ``rounds``.

    Args:
        seconds: of rounds, after which none begins; preparation does not count.
        until: a time of ``time.perf_counter`` past which no round may be expected to last; preparation counts.
    """

    rounds: int
    seconds: float = math.inf
    until: float = math.inf

    def share(self, part: float) -> Budget:
        """A part of what is left."""
        now = time.perf_counter()
        return replace(self, seconds=part * self.seconds, until=now + part * (self.until - now))

    def for_one(self, left: int) -> Budget:
        """For the next of ``left`` cases: ``seconds`` are those of each case, ``until`` is that of all together."""
        return replace(self, until=self.share(1 / left).until)


@dataclass(frozen=True)
class Figure:
    """A median with the 20th and 80th percentile, and an interval that has the true median with at least 95 %.

    Fewer than six samples have no such interval: that between their least and largest misses it more often.
    """

    median: float
    p20: float
    p80: float
    low: float | None
    high: float | None
    count: int
    calm: bool = True  # no other program took the processor meanwhile

    def as_dict(self) -> dict[str, float]:
        """Without the ends of an interval that there is not."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Times:
    """The samples of every round; a variant may have sat some out.

    Calls from which another program took the processor are left out, provided that enough are left without them: what
    they tell is how the operating system shares a machine. Ratios are formed within a round, so that drift cancels.
    """

    ENOUGH = 6  # for an interval

    def __init__(self, names: Sequence[str], rounds: list[dict[str, Sample]]) -> None:
        self.names = list(names)
        self.rounds = rounds

    def figure(self, name: str) -> Figure:
        return self._summarise([(r[name],) for r in self.rounds if name in r], lambda s: s[0].seconds)

    def ratio(self, numerator: str, denominator: str) -> Figure:
        """Of the two times of each round in which both ran."""
        return self._summarise(self._pairs(numerator, denominator), lambda s: s[0].seconds / s[1].seconds)

    def difference(self, more: str, less: str) -> Figure:
        """Of the two times of each round in which both ran, in seconds."""
        return self._summarise(self._pairs(more, less), lambda s: s[0].seconds - s[1].seconds)

    def fastest(self, names: Sequence[str]) -> str:
        return min(names, key=lambda name: self.figure(name).median)

    @property
    def disturbed(self) -> float:
        """The share of calls from which another program took the processor."""
        samples = [sample for r in self.rounds for sample in r.values()]
        return sum(sample.disturbed for sample in samples) / len(samples)

    @property
    def note(self) -> str:
        """What to know of the figures: empty on a machine of one's own."""
        if self.disturbed < 0.05:
            return ""
        return (
            f"other programs took the processor in {self.disturbed:.0%} of the calls; such calls are left out where "
            f"{self.ENOUGH} remain"
        )

    def columns(self, variants: Sequence[Variant], reference: str) -> dict[str, Any]:
        """What the report of a case takes from its times."""
        return {
            "disturbed_calls": self.disturbed,
            "reference": reference,
            "times": {v.name: {"label": v.label, **self.figure(v.name).as_dict()} for v in variants},
            "relative": {v.name: self.ratio(v.name, reference).as_dict() for v in variants},
        }

    def _pairs(self, first: str, second: str) -> list[tuple[Sample, ...]]:
        return [(r[first], r[second]) for r in self.rounds if first in r and second in r]

    def _summarise(self, rows: list[tuple[Sample, ...]], value: Callable[[tuple[Sample, ...]], float]) -> Figure:
        calm = [row for row in rows if not any(sample.disturbed for sample in row)]
        chosen = calm if len(calm) >= self.ENOUGH else rows
        return replace(summarise([value(row) for row in chosen]), calm=len(chosen) == len(calm))


def interleave(
    variants: Sequence[Variant], clock: Clock, budget: Budget, title: str, *, warm_up: int = 1, seed: int = 0
) -> Times:
    """Times all variants in rounds, in a random order each, after ``warm_up`` calls of each."""
    shuffle = random.Random(seed).shuffle
    rounds: list[dict[str, Sample]] = []
    with Progress(title, min(budget.seconds, budget.until - time.perf_counter())) as progress:
        for variant in variants:
            for _ in range(warm_up):
                progress.show(f"warm-up: {variant.label}")
                clock.time([variant.run])
        progress.restart(min(budget.seconds, budget.until - time.perf_counter()))
        last = 0.0  # seconds of the last round
        for number in range(budget.rounds):
            began = time.perf_counter()
            if number >= 2 and (progress.elapsed() > budget.seconds or began + last > budget.until):
                break
            runs = [v for v in variants if int(number * v.share) != int((number - 1) * v.share) or number == 0]
            shuffle(runs)
            progress.show(f"{len(runs)} variants, round {number + 1}")
            if isinstance(clock, CudaClock):  # enqueued together
                samples = clock.time([v.run for v in runs])
            else:
                samples = []
                for variant in runs:
                    progress.show(variant.label)
                    samples += clock.time([variant.run])
            rounds.append(dict(zip((v.name for v in runs), samples, strict=True)))
            last = time.perf_counter() - began
    return Times([v.name for v in variants], rounds)


def summarise(values: Sequence[float]) -> Figure:
    """Median, percentiles and interval; the interval is that of order statistics, which assumes no distribution."""
    if not values:
        raise ValueError("nothing was measured: the variants never ran in the same round")
    ordered = sorted(values)
    median, p20, p80 = (_quantile(ordered, q) for q in (0.5, 0.2, 0.8))
    outside = interval_rank(len(ordered))
    low, high = (None, None) if outside is None else (ordered[outside], ordered[-1 - outside])
    return Figure(median, p20, p80, low, high, len(ordered))


def interval_rank(count: int) -> int | None:
    """How many of the least and of the largest values the 95 % interval of the median leaves out; None: it has none.

    The number of samples below the median is binomial with p = 1/2.
    """
    below = 0
    for rank in range(count):
        below += math.comb(count, rank)
        if 40 * below > 2**count:  # the interval misses the median if this many or fewer lie on one side of it
            return rank - 1 if rank else None
    return None


def _quantile(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    lower = int(at)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (at - lower) * (ordered[upper] - ordered[lower])
