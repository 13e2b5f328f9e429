"""The last screen of a run: what maps, weights and a whole step cost on this machine, in plain words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.timing.harness import interval_rank

WIDTH, HEIGHT = 98, 23
BUSY = 0.05  # the share of disturbed calls from which a machine is called busy
MAPS = "Maps: attention that also returns how much each image token attends to 8 text tokens"
WEIGHTS = "Weights: the policy loss, forward and backward, with a weight for each latent position"
BOTH = "Both: a whole training step, STAR against plain Flow-GRPO"
HEADINGS = {
    "attention": MAPS,
    "backward": MAPS,
    "capture": MAPS,
    "policy": WEIGHTS,
    "end-to-end": BOTH,
    "epoch": BOTH,
}


@dataclass(frozen=True)
class Row:
    """One cost: a call without and the call with, in seconds, and the ratio of the two with its interval."""

    part: str
    label: str
    without: float
    with_it: float
    ratio: dict[str, Any]

    @property
    def calm(self) -> bool:
        return bool(self.ratio.get("calm", True))

    def __str__(self) -> str:
        extra = f"{percent(self.ratio['median'])} %"
        times = f"{duration(self.without):>10}{duration(self.with_it):>10}{extra:>10}"
        return f"  {self.label:<46}{times}   {interval(self.ratio)}{'' if self.calm else ' *'}"


def text(result: dict[str, Any]) -> str:
    """At most HEIGHT lines of at most WIDTH columns."""
    found = [row for part, cases in result["parts"].items() for case in cases for row in rows(part, case)]
    environment = result["environment"]
    where = f"{environment['device_name']}, {environment['threads']} threads, torch {environment['versions']['torch']}"
    lines = [
        f"WHAT MAPS AND WEIGHTS COST HERE  ({where})",
        f"  {'':<46}{'without':>10}{'with':>10}{'more time':>10}   95 % interval",
    ]
    for heading in dict.fromkeys(HEADINGS.values()):
        own = [str(row) for row in found if HEADINGS[row.part] == heading]
        lines += [heading, *own] if own else []
    last = wrapped(machine(result["parts"], found))
    for note in (*reading(found), *others(result["parts"])):
        more = wrapped(note)
        if len(lines) + len(more) + len(last) <= HEIGHT:
            lines += more
    return "\n".join([*lines, *last])


def wrapped(note: str) -> list[str]:
    return textwrap.wrap(note, WIDTH)


def reading(found: list[Row]) -> Iterator[str]:
    """What to know of the intervals."""
    known = [row.ratio for row in found if has_interval(row.ratio)]
    if any(ratio["low"] <= 1 <= ratio["high"] for ratio in known):
        yield "An interval that spans 0: the cost, if there is one, is too small to show in this time."
    if len(known) < len(found):
        yield "Fewer than 6 rounds give no 95 % interval: a longer run (--thorough) does."


def rows(part: str, case: dict[str, Any]) -> Iterator[Row]:
    times, ratios = case["times"], case["ratios"]

    def row(label: str, without: str, with_it: str, ratio: str) -> Row:
        return Row(part, label, times[without]["median"], times[with_it]["median"], ratios[ratio])

    dtype, blocks = case["dtype"], case.get("size", {}).get("blocks")
    if part in ("attention", "backward"):
        heads = case.get("shape", {}).get("heads", 24)
        batch = [f"batch {case['batch']}"] if case.get("batch") else []
        label = ", ".join([case["name"], *([f"{heads} of 24 heads"] if heads < 24 else batch), dtype])
        if part == "attention":
            yield row(label, "ours_without" if "ours_without" in times else "sdpa", "ours", "overhead")
        else:
            yield row(f"backward, {label}", "ours", "ours_maps", "map_gradient_overhead")
    elif part == "policy" and "ours_weighted" in times:
        yield row(f"{case['title'].split(',')[0]}, {dtype}", "ours", "ours_weighted", "ours_weighted_over_ours")
    elif part == "capture":
        label = f"whole forward pass, {blocks} of SD3.5-M's 24 blocks"
        yield row(label, "plain", "captured", "capture_over_plain")
    elif part == "end-to-end":
        label = f"rollout and update, {blocks} of SD3.5-M's 24 blocks"
        yield row(label, "plain", "star", "star_over_plain")
    elif part == "epoch":
        yield row("epoch of star-train, small model", "plain", "star", "star_over_plain")
        plain, by_parts = times["plain"]["median"], ratios["star_by_parts"]
        label = "the same, only what STAR adds, timed by itself"
        yield Row(part, label, plain, plain * by_parts["median"], by_parts)


def others(parts: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """What it costs without this project."""
    for case in parts.get("attention", [])[:1]:
        slower = {
            name: case["ratios"][f"{key}_over_ours"]["median"]
            for key, name in (("augmented_value", "columns in V"), ("lse_difference", "attention twice"),
                              ("materialised", "the whole softmax"))
        }  # fmt: skip
        told = ", ".join(f"{ratio:.1f} ({name})" for name, ratio in slower.items())
        yield f"Other ways to such maps take this many times as long as ours: {told}."
    for case in parts.get("policy", [])[:1]:
        ratios = case["ratios"]
        compiled = ratios.get("compiled_over_ours")
        told = f", under torch.compile {compiled['median']:.1f} times" if compiled else ""
        memory = ratios["memory_over_gradient_eager"]["median"] / ratios["memory_over_gradient"]["median"]
        yield (
            f"The loss without weights in plain PyTorch takes {ratios['eager_over_ours']['median']:.1f} times as long "
            f"as ours{told}, and {memory:.0f} times the memory."
        )


def machine(parts: dict[str, list[dict[str, Any]]], found: list[Row]) -> str:
    """Whether the figures are the machine's own."""
    shares = [case["disturbed_calls"] for cases in parts.values() for case in cases]
    share = sum(shares) / max(1, len(shares))
    if share < BUSY and all(row.calm for row in found):
        return f"The machine was calm: other programs took the processor in {share:.0%} of the calls."
    told = f"THE MACHINE WAS BUSY: other programs took the processor in {share:.0%} of the calls, which do not count"
    if all(row.calm for row in found):
        return f"{told}. A calm machine gives narrower intervals."
    return (
        f"{told}, except in rows with a *: too few were left there, and those figures may be the other programs'. "
        "Repeat on a calm machine."
    )


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}"


def interval(ratio: dict[str, Any]) -> str:
    if has_interval(ratio):
        return f"{percent(ratio['low'])} to {percent(ratio['high'])} %"
    return f"none: {ratio['count']} rounds"


def has_interval(ratio: dict[str, Any]) -> bool:
    return "low" in ratio and interval_rank(ratio["count"]) is not None


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"
