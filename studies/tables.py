"""The tables of the studies, made from the JSON files in studies/results. tools.evidence writes them into pages."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.reporting.tables import markdown_table
from studies import efficiency, noise
from studies.agreement import shown
from studies.cosines import Multiple, cosines, multiple
from studies.learning import EARLY, by_arm, differences, early, mean_curve, paired
from studies.learning import text as learning_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies" / "results"
AGREEMENT = RESULTS / "gradient-agreement.json"
SMALL_MODELS = {
    "A": RESULTS / "small-sd3-model-a.json",
    "B": RESULTS / "small-sd3-model-b.json",
    "C, which ships": ROOT / "python" / "star_trainer" / "assets" / "small-sd3" / "metrics.json",
}
LEARNING = RESULTS / "learning.json"
LEARNING_FIRST = RESULTS / "learning-first.json"
DEMO = RESULTS / "demo.jsonl"
PARTS = RESULTS / "learning-parts.json"
TUNING = RESULTS / "learning-tuning.json"
MISSING = RESULTS / "missing-objects.json"
NOISE = RESULTS / "noise.json"
WIDE = 2.0  # half-width from which on an efficiency is not known
KINDS = ("scaled", "along scalar")
LARGE = 5_000  # samples from which the intervals of a unit are narrow enough to compare allocations


def demo() -> str:
    """The run of ``make demo`` whose images are in docs/images; "process" has its user and system time."""
    lines = [json.loads(line) for line in DEMO.read_text().splitlines()]
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    epochs = [line for line in lines if line["event"] == "epoch"]
    seconds = sum(line["cpu_seconds"] for line in lines if line["event"] == "process")
    return (
        f"In {len(epochs)} epochs, {seconds:.0f} seconds of processor time, the reward of held-out prompts rises from "
        f"{evaluations[0]['reward']:.3f} to {evaluations[-1]['reward']:.3f}."
    )


def small_models() -> str:
    """Metrics of three models trained by ``star-train-small``. The last one is in the package."""
    heads = [
        "composition: mean reward",
        "composition: all fulfilled",
        "text: mean reward",
        "text: all fulfilled",
        "correlation of map and object in the middle step, by block",
        "minutes",
    ]
    rows = {}
    for title, path in SMALL_MODELS.items():
        found = json.loads(path.read_text())
        scores = [
            f"{found['scenes'][task][kind]:.3f}" for task in ("composition", "text") for kind in ("graded", "exact")
        ]
        finding = [f"{n}: {steps[len(steps) // 2]:.2f}" for n, steps in enumerate(found["localisation"])]
        threads = f"{found['threads']} thread" + "s" * (found["threads"] > 1)
        rows[title] = [*scores, ", ".join(finding), f"{found['training_minutes']:.0f}, {threads}"]
    return markdown_table("", heads, rows)


def agreement() -> str:
    """Mean cosines of gradients and effective-sample multiples, a table for each unit of the study."""
    tables = []
    for unit in json.loads(AGREEMENT.read_text())["units"]:
        arms = shown(unit)
        kinds = list(cosines(arms["scalar"]))
        key = unit["key"]
        title = (
            f"{unit['label']}, {key['task']}, {key['batches']} batches of {key['samples']}, reward {unit['reward']:.2f}"
        )
        rows = {name: [_agreement(arms, name, kind) for kind in kinds] for name in arms}
        tables.append(markdown_table(title, [kind or "cosine" for kind in kinds], rows))
    return "\n\n".join(tables)


def agreement_multiples() -> str:
    """STAR's allocation, "split" and their controls at every policy and task of the study, scaled and along scalar."""
    units = {
        f"{unit['label']}, {unit['key']['task']}": unit["agreement"]
        for unit in _large_units()
        if _is_above_noise(unit) and not unit["key"]["size"]
    }
    names = {
        "core": "core, the paper's map, all blocks",
        "core, preset blocks": "core, blocks that find the words",
        "shuffled": "core at random positions",
        "inverted": "core inverted",
        "split": "**split**, blocks that find the words",
        "split, shuffled": "split at random positions",
        "means of one": "means of one, all blocks",
        "means of one, preset blocks": "means of one, blocks that find the words",
        "means of one, rest by core": "means of one, the rest by the core map of those blocks",
        "means of one, shuffled": "means of one at random positions",
        "means of one, inverted": "means of one inverted",
        "object mask (oracle)": "mask of the finished image",
        "parts off other objects (oracle)": "parts off other objects of the finished image",
        "parts on own objects (oracle)": "parts on their own objects of the finished image",
    }
    tables = []
    for kind in (*KINDS, "step"):
        columns = {title: arms for title, arms in units.items() if kind in cosines(arms["scalar"])}
        rows = {}
        for name, title in names.items():
            measured = [name in arms and kind in cosines(arms[name]) for arms in columns.values()]
            if any(measured):
                values = zip(columns.values(), measured, strict=True)
                rows[title] = [str(_times(arms, name, kind)) if known else "" for arms, known in values]
        tables.append(markdown_table(f"{kind}: effective-sample multiple", list(columns), rows))
    return "\n\n".join(tables)


def agreement_sizes() -> str:
    """Effective-sample multiples for prompts with one object, by the size of the object."""
    units = {size: _unit(f"model C, {size} objects")["agreement"] for size in ("small", "large")}
    rows = {
        name: [str(_times(arms, name, kind)) for kind in KINDS for arms in units.values()]
        for name in units["small"]
        if name != "scalar" and ", step" not in name
    }
    heads = [f"{kind}, {size}" for kind in KINDS for size in units]
    scalar = [_cosine(cosines(arms["scalar"])[kind]) for kind in KINDS for arms in units.values()]
    return markdown_table("effective-sample multiple", heads, {"scalar, its cosine": scalar, **rows})


def agreement_steps() -> str:
    """Agreement of the gradients of single denoising steps, and effective-sample multiples of weights over steps."""
    arms = _unit("model A, other samples")["agreement"]
    steps = sorted(name for name in arms if name.startswith("scalar, step"))
    rows = {
        f"step {name.split()[-1]}": [str(len(arms[name]["without"])), *(_cosine(arms[name][kind]) for kind in KINDS)]
        for name in steps
    }
    signals = ("contrast", "change", "noise")
    table = markdown_table("scalar advantages, single steps: cosine", ["batches", *KINDS], rows)
    worth = markdown_table(
        "weights over steps: effective-sample multiple",
        ["unscaled", *KINDS],
        {name: [str(_times(arms, f"steps by {name}", kind)) for kind in ("", *KINDS)] for name in signals},
    )
    return f"{table}\n\n{worth}"


def agreement_training() -> str:
    """Cosines at the start and after training."""
    units = {name: _unit(f"model C, first two steps{name}")["agreement"] for name in ("", ", after training")}
    rows = {}
    for name in ("scalar", "core, preset blocks", "split", "means of one, preset blocks", "object mask (oracle)"):
        rows[name] = [_cosine(cosines(arms[name])[kind]) for kind in KINDS for arms in units.values()]
    return markdown_table("cosine", [f"{kind}, {when}" for kind in KINDS for when in ("start", "after training")], rows)


def agreement_phrases() -> str:
    """Credit by phrase at model A."""
    arms = _unit("model A")["agreement"]
    rows = {
        "**means of one**, each phrase's part by its own map": "means of one",
        "**phrase**, advantages of phrases, by their maps": "phrases alone",
        "**phrase**, without maps": "phrases without maps",
    }
    learned = [_learned(arm, LEARNING_FIRST) for arm in ("split, means of one", "phrases", "phrases without maps")]
    return markdown_table(
        "effective-sample multiple",
        ["unscaled", "scaled", "along scalar", "final reward minus that of plain Flow-GRPO"],
        {
            title: [*(str(_times(arms, name, kind)) for kind in ("", *KINDS)), end]
            for (title, name), end in zip(rows.items(), learned, strict=True)
        },
    )


def learning_tuning() -> str:
    """Plain Flow-GRPO with the settings among which those of the second study were chosen."""
    found = json.loads(TUNING.read_text())
    rows = {}
    for arm, runs in by_arm(found, "composition").items():
        curve = mean_curve(runs)
        own = [" ".join(f"{run['evaluations'][-1][1]:.3f}" for run in runs.values())]
        rows[arm] = [*(f"{reward - curve[0][1]:+.4f}" for _, reward in curve[1:]), *own]
    epochs = [epoch for epoch, _ in curve[1:]]
    return markdown_table(
        "plain Flow-GRPO", [*(f"gain after {epoch} epochs" for epoch in epochs), "final, each seed"], rows
    )


def learning_table(path: Path) -> str:
    """A study's final rewards, and their differences from plain Flow-GRPO with the same seeds."""
    return f"```text\n{learning_text(json.loads(path.read_text())).strip()}\n```"


def learning_result(path: Path = LEARNING, baseline: str = "plain", share: bool = False) -> str:
    """A line for each comparison of a study with its baseline; if ``share``, also at EARLY of the samples."""
    arms = by_arm(json.loads(path.read_text()), _task(path))
    gain = statistics.mean(run["evaluations"][-1][1] - run["evaluations"][0][1] for run in arms[baseline].values())
    lines = [f"The reward of {baseline} rises by {gain:.4f}. Difference of the final reward from {baseline}:", ""]
    for arm in arms:
        if arm == baseline:
            continue
        line = f"- {arm}: {_learned(arm, path)}"
        if share:
            difference, half_width, p = paired(early(arms[baseline], arms[arm]))
            line += f"; after {EARLY:g} of the samples {difference:+.4f} ± {half_width:.4f} (p = {p:.2g})"
        lines.append(line)
    return "\n".join(lines)


def learning_parts() -> str:
    """The parts of the reward that the arms of the second study have learned."""
    runs = json.loads(PARTS.read_text())["runs"]
    rows = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        means = {name: statistics.mean(run[name] for run in own) for name in ("reward", "phrases", "rest")}
        objects = {name: statistics.mean(run[name] for run in own) for name in ("surplus", "missing")}
        values = [*(f"{value:.3f}" for value in means.values()), *(f"{value:.2f}" for value in objects.values())]
        rows[f"{arm} ({len(own)})" if own[0]["seed"] is not None else arm] = values
    heads = ["reward", "from phrases", "from the rest", "surplus objects", "missing objects"]
    return markdown_table("means over images and seeds", heads, rows)


def missing_objects() -> str:
    """Efficiencies of allocations along the gradient of plain Flow-GRPO, and where the maps lie."""
    tables = []
    for unit in json.loads(MISSING.read_text())["units"]:
        batches, key = unit["batches"], unit["key"]
        absent = statistics.mean(batch["missing"] for batch in batches)
        samples = len(batches) * key["groups"] * key["group_size"]
        parts = (efficiency.WHOLE, efficiency.FIRST) if "whole" in key["name"] else (efficiency.WHOLE,)
        for part in parts:
            title = f"{key['name']}, {part}: efficiency, {samples:,} samples, an object is missing in {absent:.0%}"
            rows = {name: _efficiencies(unit, name, part) for name in efficiency.names(unit) if name != "plain"}
            heads = ["all samples", "object found", "object missing", "all, minus map", "times the samples"]
            tables.append(markdown_table(title, heads, rows))
        tables.append(_localization(unit))
    return "\n\n".join(tables)


def missing_objects_result() -> str:
    """The efficiencies of the allocations in the first two steps."""
    unit = json.loads(MISSING.read_text())["units"][0]
    names = [name for name in efficiency.names(unit) if name != "plain"]
    rows = {name: _efficiencies(unit, name, efficiency.FIRST)[:-1] for name in names}
    heads = ["all samples", "object found", "object missing", "all, minus map"]
    drawn, planned = len(unit["batches"]), unit["key"]["batches"]
    return markdown_table(f"efficiency, first two steps, {drawn} of {planned} batches", heads, rows)


def missing_objects_steps() -> str:
    """Progress of each denoising step along the gradient of plain Flow-GRPO, in units of plain's in the first step."""
    unit = json.loads(MISSING.read_text())["units"][0]
    rows, count = {}, len(unit["batches"])
    first = statistics.mean(
        sum(unit["progress"]["plain"][kind][n][0] for kind in efficiency.CLASSES) for n in range(count)
    )
    for name in ("plain", "map", "object mask (oracle)"):
        batches = [
            [
                sum(values)
                for values in zip(*(unit["progress"][name][kind][n] for kind in efficiency.CLASSES), strict=True)
            ]
            for n in range(count)
        ]
        columns = list(zip(*batches, strict=True))
        errors = [1.96 * statistics.stdev(own) / math.sqrt(count) for own in columns]
        rows[name] = [
            f"{statistics.mean(own) / first:.1f} ± {error / first:.1f}"
            for own, error in zip(columns, errors, strict=True)
        ]
    return markdown_table("progress by step", [str(n) for n in range(len(columns))], rows)


def noise_scale() -> str:
    """The number of samples at which noise and signal of the plain gradient are equal."""
    rows = {}
    for unit in json.loads(MISSING.read_text())["units"]:
        samples = unit["key"]["groups"] * unit["key"]["group_size"]
        rows[f"GenEval's rule, {unit['key']['name']}"] = _noise_scale(unit["agreement"], samples)
    for unit in _large_units():
        if unit["key"]["task"] == "composition" and not unit["key"]["size"] and _is_above_noise(unit):
            rows[f"nothing else, {unit['label']}"] = _noise_scale(
                unit["agreement"]["scalar"]["scaled"], unit["key"]["samples"]
            )
    return markdown_table("plain Flow-GRPO", ["samples", "cosine of two batches", "noise equals signal at"], rows)


def _noise_scale(found: dict[str, Any], samples: int) -> list[str]:
    low, value, high = (max(found["cosine"] + sign * 1.96 * found["error"], 0) for sign in (-1, 0, 1))
    least, at = (samples * (1 - c) / c for c in (high, value))
    most = f"{samples * (1 - low) / low:,.0f}" if low > 0 else "no limit"
    return [str(samples), _cosine(found), f"{at:,.0f} samples ({least:,.0f} to {most})"]


def _efficiencies(unit: dict[str, Any], name: str, part: str) -> list[str]:
    kinds = (efficiency.CLASSES, *([kind] for kind in efficiency.CLASSES))
    found = [efficiency.efficiency(unit, name, own, part) for own in kinds]
    more = "" if name == "map" else _known(efficiency.gain(unit, name, "map", part))
    known = found[0].half_width < WIDE
    return [*map(_known, found), more, f"{found[0].value ** 2:.2f}" if known else "not known"]


def _known(estimate: efficiency.Estimate) -> str:
    return str(estimate) if estimate.half_width < WIDE else "not known"


def _localization(unit: dict[str, Any]) -> str:
    """Correlations of the maps with the pixels of the colors in the prompt, for each trained step."""
    rows = {}
    for name in unit["batches"][0]["localization"]:
        row = []
        for kind in efficiency.CLASSES:
            steps = [
                statistics.mean(values)
                for values in zip(*(b["localization"][name][kind] for b in unit["batches"]), strict=True)
            ]
            row.append(", ".join(f"{value:.2f}" for value in steps))
        rows[name] = row
    heads = [f"object {kind}: correlation with its color, by step" for kind in efficiency.CLASSES]
    return markdown_table(unit["key"]["name"], heads, rows)


def noise_limits() -> str:
    """Samples that plain Flow-GRPO needs to reach the goal, by samples for an update and learning rate."""
    found = json.loads(NOISE.read_text())
    tables = []
    for steps, by_samples in noise.table(found).items():
        rates = sorted({rate for by_rate in by_samples.values() for rate in by_rate})
        rows = {
            f"{samples} an update": [", ".join(_count(value) for value in by_rate.get(rate, [])) for rate in rates]
            for samples, by_rate in by_samples.items()
        }
        goal = found["design"]["steps"][steps]["goal"]
        title = f"{steps}: samples to a reward of {goal:g}, by learning rate, each seed"
        tables.append(markdown_table(title, [f"{rate:g}" for rate in rates], rows))
    ended = sum(noise.ended(run, found["design"]) for run in found["runs"])
    for run in found["runs"]:
        if not noise.ended(run, found["design"]):
            curve = ", ".join(f"{reward:.3f} at {samples:,}" for samples, reward in run["evaluations"])
            name = f"{run['steps']}, {run['samples']} an update, rate {run['rate']:g}, seed {run['seed']}"
            tables.append(f"Not ended: {name}, reward {curve}.")
    return "\n\n".join(
        [*tables, f"{ended} of the {len(list(noise.cells(found['design'])))} runs of the design have ended."]
    )


def _count(samples: float) -> str:
    return f"{samples:,.0f}" if math.isfinite(samples) else "not reached"


def _learned(arm: str, path: Path) -> str:
    """The final reward of an arm minus that of plain Flow-GRPO, with its interval and p-value."""
    arms = by_arm(json.loads(path.read_text()), _task(path))
    pairs = differences(arms["plain"], arms[arm])
    difference, half_width, p = paired(pairs)
    return f"{difference:+.4f} ± {half_width:.4f}, p = {p:.2g}, {len(pairs)} seeds"


def _task(path: Path) -> str:
    return "text" if path.stem.endswith("text") else "composition"


def _large_units() -> list[dict[str, Any]]:
    """The units that are large enough to compare allocations."""
    units = json.loads(AGREEMENT.read_text())["units"]
    return [unit for unit in units if unit["key"]["batches"] * unit["key"]["samples"] >= LARGE]


def _is_above_noise(unit: dict[str, Any]) -> bool:
    """Whether the cosine of plain Flow-GRPO, the denominator of all multiples, is above the noise."""
    scaled = unit["agreement"]["scalar"]["scaled"]
    return bool(scaled["cosine"] > 1.96 * scaled["error"])


def _unit(label: str) -> dict[str, Any]:
    return next(unit for unit in _large_units() if unit["label"] == label)


def _times(arms: dict[str, Any], name: str, kind: str) -> Multiple:
    return multiple(cosines(arms[name])[kind], cosines(arms["scalar"])[kind])


def _agreement(arms: dict[str, Any], name: str, kind: str) -> str:
    if kind not in cosines(arms[name]):
        return ""
    own, times = cosines(arms[name])[kind], _times(arms, name, kind)
    return f"{_cosine(own)}, {times}" if name != "scalar" and times.known else _cosine(own)


def _cosine(found: dict[str, Any]) -> str:
    return f"{found['cosine']:.4f} ± {1.96 * found['error']:.4f}"
