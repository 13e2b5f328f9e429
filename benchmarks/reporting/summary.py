"""The summary at the end of a run: the cost of maps, of weights and of a whole training step on this machine."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.timing.harness import interval_rank

WIDTH, HEIGHT = 98, 23
BUSY = 0.05  # share of disturbed calls above which a machine is called busy
MAPS = "Maps: attention with maps of 8 text tokens, compared with attention without maps"
WEIGHTS = "Weights: policy loss with a weight for each latent position, forward and backward"
CALLS = "Host time of a call on tiny tensors"
BOTH = "Maps and weights: training with STAR, compared with plain Flow-GRPO"
COMPILED = "Compiled transformer: with maps, compared with the same without"
HEADINGS = {
    "attention": MAPS,
    "backward": MAPS,
    "capture": MAPS,
    "policy": WEIGHTS,
    "end-to-end": BOTH,
    "compiled": COMPILED,
    "epoch": BOTH,
}
HOST = {  # name of a pair of benchmarks/parts/host.py -> name in the summary
    "attention": "attention",
    "attention_gradients": "with gradients",
    "policy_loss": "policy loss with gradients (PolicyLoss.backward)",
    "policy_loss_autograd": "by loss.backward()",
    "sample_transition": "sample_transition",
    "flow_sde": "flow_sde",
    "allocate": "allocate",
}


@dataclass(frozen=True)
class Row:
    """One cost: the time without and with maps or weights, in seconds, and their ratio with its interval."""

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
    """The summary, in at most HEIGHT lines of at most WIDTH columns."""
    found = [row for part, cases in result["parts"].items() for case in cases for row in rows(part, case)]
    environment = result["environment"]
    where = f"{environment['device_name']}, {environment['threads']} threads, torch {environment['versions']['torch']}"
    lines = [f"COST OF MAPS AND WEIGHTS  ({where})"]
    if found:
        lines.append(f"  {'':<46}{'without':>10}{'with':>10}{'overhead':>10}   95 % interval")
    for heading in dict.fromkeys(HEADINGS.values()):
        own = [str(row) for row in found if HEADINGS[row.part] == heading]
        lines += [heading, *own] if own else []
    last = wrapped(machine(result["parts"], found))
    for note in (*notes_on_intervals(found), *alternatives(result["parts"])):
        more = wrapped(note)
        if len(lines) + len(more) + len(last) <= HEIGHT:
            lines += more
    return "\n".join([*lines, *last])


def wrapped(note: str) -> list[str]:
    return textwrap.wrap(note, WIDTH)


def notes_on_intervals(found: list[Row]) -> Iterator[str]:
    """Sentences that explain the intervals."""
    known = [row.ratio for row in found if has_interval(row.ratio)]
    if any(ratio["low"] <= 1 <= ratio["high"] for ratio in known):
        yield "If an interval contains 0, the overhead is too small to be measured in this time."
    if len(known) < len(found):
        yield "A 95 % interval requires at least 6 rounds; use --thorough for a longer run."


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
        elif "detached" in times:
            yield row(f"backward, {label}", "sdpa", "detached", "detached_over_sdpa")
        else:
            yield row(f"map gradient, {label}", "ours", "ours_maps", "map_gradient_overhead")
    elif part == "policy" and "ours_weighted" in times:
        yield row(f"{case['title'].split(',')[0]}, {dtype}", "ours", "ours_weighted", "ours_weighted_over_ours")
    elif part == "capture":
        label = f"forward pass, {blocks} of 24 SD3.5-M blocks"
        yield row(label, "plain", "captured", "capture_over_plain")
    elif part == "end-to-end":
        label = f"rollout and update, {blocks} of 24 SD3.5-M blocks"
        yield row(label, "plain", "star", "star_over_plain")
    elif part == "compiled" and "eager_plain" in times:
        label = f"rollout and update, {blocks} of 24 SD3.5-M blocks"
        yield row(label, "compiled_plain", "compiled_star", "compiled_star_over_plain")
    elif part == "compiled":
        for mode in (mode for mode in ("compiled", "graphs") if mode in times):
            label = f"forward pass, {blocks} of 24 blocks{', CUDA graphs' * (mode == 'graphs')}"
            yield row(label, mode, f"{mode}_captured", f"{mode}_capture_over_plain")
    elif part == "epoch":
        yield row("epoch of star-train, small model", "plain", "star", "star_over_plain")
        plain, by_parts = times["plain"]["median"], ratios["star_by_parts"]
        label = "the same epoch, from the parts that STAR adds"
        yield Row(part, label, plain, plain * by_parts["median"], by_parts)


def alternatives(parts: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Sentences that compare other implementations with ours."""
    for case in parts.get("host", [])[:1]:
        times = case["times"]
        found = ", ".join(
            f"{name} {duration(times[f'ours_{key}']['median'])} ({duration(times[f'other_{key}']['median'])})"
            for key, name in HOST.items()
        )
        yield f"{CALLS}, in brackets the same in PyTorch: {found}."
    for case in parts.get("attention", [])[:1]:
        slower = {
            name: case["ratios"][f"{key}_over_ours"]["median"]
            for key, name in (("augmented_value", "more columns in V"), ("lse_difference", "two attention passes"),
                              ("materialised", "materialised softmax"))
        }  # fmt: skip
        factors = ", ".join(f"{ratio:.1f} ({name})" for name, ratio in slower.items())
        yield f"Other ways to compute the maps, time relative to ours: {factors}."
    for case in parts.get("policy", [])[:1]:
        ratios = case["ratios"]
        compiled = ratios.get("compiled_over_ours")
        with_compiler = f" ({compiled['median']:.1f} with torch.compile)" if compiled else ""
        memory = ratios["memory_over_gradient_eager"]["median"] / ratios["memory_over_gradient"]["median"]
        yield (
            f"The loss without weights in plain PyTorch takes {ratios['eager_over_ours']['median']:.1f} times the time "
            f"of ours{with_compiler} and {memory:.0f} times the memory."
        )


def machine(parts: dict[str, list[dict[str, Any]]], found: list[Row]) -> str:
    """A sentence about other programs that used the processor during the run."""
    shares = [case["disturbed_calls"] for cases in parts.values() for case in cases]
    share = sum(shares) / max(1, len(shares))
    if share < BUSY and all(row.calm for row in found):
        return f"The machine was idle: other programs used the processor in {share:.0%} of the calls."
    busy = f"THE MACHINE WAS BUSY: other programs used the processor in {share:.0%} of the calls. These are excluded"
    if all(row.calm for row in found):
        return f"{busy}. An idle machine gives narrower intervals."
    return (
        f"{busy}, except in rows marked with *, which have too few other calls and may show the other programs' time. "
        "Repeat the run on an idle machine."
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
