"""Timing and statistics: interleaved calls, medians with intervals, and ratios within a round."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from benchmarks.timing.clocks import Clock, CudaClock, Sample
from benchmarks.timing.progress import Progress

Extent = Literal["quick", "default", "thorough"]  # tiny shapes for tests; a few minutes; the published results


@dataclass(frozen=True)
class Variant:
    """One implementation in a comparison. A slow one runs only in a ``share`` of the rounds."""

    name: str
    label: str
    run: Callable[[], Any]
    share: float = 1.0


@dataclass(frozen=True)
class Budget:
    """The time limit of a comparison. At least two rounds are run.

    Args:
        rounds: maximum number of rounds.
        seconds: no round starts later than this after the first one. Preparation is excluded.
        until: no round starts if it is expected to end after this time of ``time.perf_counter``. Preparation is
            therefore included.
    """

    rounds: int
    seconds: float = math.inf
    until: float = math.inf

    def share(self, part: float) -> Budget:
        """The given fraction of this budget's remaining time."""
        now = time.perf_counter()
        return replace(self, seconds=part * self.seconds, until=now + part * (self.until - now))

    def for_next(self, left: int) -> Budget:
        """The budget of the next of ``left`` cases. ``seconds`` applies to each case, ``until`` to all of them."""
        return replace(self, until=self.share(1 / left).until)


@dataclass(frozen=True)
class Figure:
    """A median with its 20th and 80th percentile and its 95 % confidence interval.

    With fewer than six samples there is no such interval: even the range of the samples has a lower confidence.
    """

    median: float
    p20: float
    p80: float
    low: float | None
    high: float | None
    count: int
    calm: bool = True  # no other program used the processor during the calls

    def as_dict(self) -> dict[str, float]:
        """The fields as a dictionary, without ``low`` and ``high`` if there is no interval."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Times:
    """The samples of every round. Not every variant runs in every round.

    Calls during which another program used the processor are excluded if at least ``ENOUGH`` other calls remain. Ratios
    are computed within a round, so that drift cancels.
    """

    ENOUGH = 6  # the fewest samples with an interval

    def __init__(self, names: Sequence[str], rounds: list[dict[str, Sample]]) -> None:
        self.names = list(names)
        self.rounds = rounds

    def figure(self, name: str) -> Figure:
        return self._summarise([(r[name],) for r in self.rounds if name in r], lambda s: s[0].seconds)

    def ratio(self, numerator: str, denominator: str) -> Figure:
        """Ratio of the times of two variants, over the rounds in which both ran."""
        return self._summarise(self._pairs(numerator, denominator), lambda s: s[0].seconds / s[1].seconds)

    def difference(self, more: str, less: str) -> Figure:
        """Difference of the times of two variants in seconds, over the rounds in which both ran."""
        return self._summarise(self._pairs(more, less), lambda s: s[0].seconds - s[1].seconds)

    def ratios(self, pairs: Mapping[str, tuple[str, str, str]]) -> dict[str, dict[str, Any]]:
        """The entries of a case's report for ratios, from their label, numerator and denominator."""
        return {key: {"label": label, **self.ratio(a, b).as_dict()} for key, (label, a, b) in pairs.items()}

    def fastest(self, names: Sequence[str]) -> str:
        return min(names, key=lambda name: self.figure(name).median)

    @property
    def disturbed(self) -> float:
        """The share of calls during which another program used the processor."""
        samples = [sample for r in self.rounds for sample in r.values()]
        return sum(sample.disturbed for sample in samples) / len(samples)

    @property
    def note(self) -> str:
        """A note about other programs; empty if they used the processor in less than 5 % of the calls."""
        if self.disturbed < 0.05:
            return ""
        return (
            f"other programs used the processor in {self.disturbed:.0%} of the calls; these calls are excluded if at "
            f"least {self.ENOUGH} others remain"
        )

    def columns(self, variants: Sequence[Variant], reference: str) -> dict[str, Any]:
        """The entries of a case's report that are computed from its times."""
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
    """Times all variants in rounds, each in a random order, after ``warm_up`` calls of each variant."""
    shuffle = random.Random(seed).shuffle
    rounds: list[dict[str, Sample]] = []
    with Progress(title, min(budget.seconds, budget.until - time.perf_counter())) as progress:
        for variant in variants:
            for _ in range(warm_up):
                progress.show(f"warm-up: {variant.label}")
                clock.time([variant.run])
        progress.restart(min(budget.seconds, budget.until - time.perf_counter()))
        last = 0.0  # duration of the last round
        for number in range(budget.rounds):
            began = time.perf_counter()
            if number >= 2 and (progress.elapsed() > budget.seconds or began + last > budget.until):
                break
            runs = [v for v in variants if int(number * v.share) != int((number - 1) * v.share) or number == 0]
            shuffle(runs)
            progress.show(f"{len(runs)} variants, round {number + 1}")
            if isinstance(clock, CudaClock):  # all calls of a round are enqueued together
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
    """Median, percentiles and the distribution-free 95 % interval of the median, from order statistics."""
    if not values:
        raise ValueError("values is empty: the variants did not run in the same round")
    ordered = sorted(values)
    median, p20, p80 = (_quantile(ordered, q) for q in (0.5, 0.2, 0.8))
    outside = interval_rank(len(ordered))
    low, high = (None, None) if outside is None else (ordered[outside], ordered[-1 - outside])
    return Figure(median, p20, p80, low, high, len(ordered))


def interval_rank(count: int) -> int | None:
    """Number of values to drop at each end of the sorted values to get the 95 % interval of their median.

    The number of samples below the median is binomial with p = 1/2. Returns None if there are too few values for an
    interval.
    """
    below = 0
    for rank in range(count):
        below += math.comb(count, rank)
        if 40 * below > 2**count:  # P(at most ``rank`` samples below the median) > 2.5 %
            return rank - 1 if rank else None
    return None


def _quantile(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    lower = int(at)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (at - lower) * (ordered[upper] - ordered[lower])
