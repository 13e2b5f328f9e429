"""Writes the measured figures into README and docs: python benchmarks/evidence.py [--check]

A block between ``<!-- figures: NAME -->`` and ``<!-- end -->`` is made from the JSON files in benchmarks/results by the
function of that name here, so that no figure is copied by hand. ``--check`` changes nothing and exits with status 1
where text and JSON differ; a test does the same.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gradient_agreement import Multiple, cosines, multiple, shown
from harness import interval_rank
from learning import EARLY, by_arm, differences, early, mean_curve, paired
from learning import text as learning_text

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
OVERHEAD = RESULTS / "overhead-amd-epyc-2-threads-avx2.json"
EPOCH = RESULTS / "epoch-amd-epyc-2-threads-avx2.json"
GPU = RESULTS / "overhead-nvidia-h200.json"
EPILOGUES = RESULTS / "epilogue-nvidia-h200.json"
DEMO = RESULTS / "demo.jsonl"
AGREEMENT = RESULTS / "gradient-agreement.json"
SMALL_MODELS = {
    "A": RESULTS / "small-sd3-model-a.json",
    "B": RESULTS / "small-sd3-model-b.json",
    "C, which ships": ROOT / "python" / "star_trainer" / "assets" / "small-sd3" / "metrics.json",
}
LEARNING = RESULTS / "learning.json"
LEARNING_TEXT = RESULTS / "learning-text.json"
LEARNING_RATIO = RESULTS / "learning-ratio.json"
LEARNING_WHEN = RESULTS / "learning-when.json"
LEARNING_FIRST = RESULTS / "learning-first.json"
PARTS = RESULTS / "learning-parts.json"
TUNING = RESULTS / "learning-tuning.json"
OTHER_WAYS = {  # to attention maps
    "lse_difference": "log-sum-exp difference",
    "augmented_value": "augmented V",
    "materialised": "materialised softmax",
}
KINDS = ("scaled", "along scalar")
LARGE = 5_000  # samples of a unit of agreement whose intervals say something
_BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def attention() -> str:
    """Attention with maps beside other ways to get them."""
    columns = {"ours": "ours", **OTHER_WAYS}
    rows = {}
    for case in _cases("attention"):
        heads = re.search(r"batch \d+, (\d+) heads", case["title"])
        part = f"{heads[1]} of 24 heads" if heads and heads[1] != "24" else "batch 2"
        rows[f"{case['name']}, {part}, {case['dtype']}"] = [_relative(case, name) for name in columns]
    return _table(
        "attention with maps of 8 tokens, relative to PyTorch's SDPA without maps", list(columns.values()), rows
    )


def policy() -> str:
    """Times of the policy loss."""
    columns = {
        "ours": "ours",
        "ours_weighted": "ours, with weights",
        "eager": "eager Flow-GRPO",
        "compiled": "the same under torch.compile",
    }
    rows = {
        case["dtype"]: [f"{1e3 * case['times'][name]['median']:.2f} ms" for name in columns]
        for case in _cases("policy")
    }
    return _table("policy loss, forward and backward, batch 8 of 16x64x64", list(columns.values()), rows)


def steps() -> str:
    """Memory of the loss; capture, a training step and an epoch with STAR relative to without."""
    memory = [case["ratios"]["memory_over_gradient_eager"]["median"] for case in _cases("policy")]
    (capture,), (step,), (epoch,) = _cases("capture"), _cases("end-to-end"), _cases("epoch", EPOCH)
    return "\n".join(
        [
            f"The loss's extra memory is one gradient; eager arithmetic takes {memory[0]:.0f} (float32) to "
            f"{memory[1]:.0f} (bfloat16) of them.",
            "",
            "| with STAR, relative to without | time | peak memory |",
            "|---|---|---|",
            f"| forward pass of {capture['size']['blocks']} blocks of SD3.5-M at 1024², maps captured | "
            f"{_ratio(capture, 'capture_over_plain')} | {_ratio(capture, 'capture_memory')} |",
            f"| rollout and update of 2 blocks of SD3.5-M at 256² | {_ratio(step, 'star_over_plain')} | |",
            f"| epoch of the driver with the small model, rewards included | {_ratio(epoch, 'star_over_plain')} | "
            f"{_ratio(epoch, 'star_memory')} |",
            f"| the same epoch, all that STAR adds timed by itself | {_ratio(epoch, 'star_by_parts')} | |",
        ]
    )


def gpu_attention() -> str:
    """Attention with maps on a GPU, with what maps add to the same kernel."""
    columns = {"sdpa_flash": "flash without maps", "ours": "ours, with maps", **OTHER_WAYS}
    rows = {}
    for case in _cases("attention", GPU):
        cells = [_relative(case, name) if name in case["relative"] else "" for name in columns]
        rows[f"{case['name']}, batch {case['batch']}, {case['dtype']}"] = [
            f"{1e3 * case['times']['sdpa']['median']:.2f} ms", *cells, _three(case["ratios"]["overhead"]["median"])
        ]  # fmt: skip
    heads = ["PyTorch's SDPA", *columns.values(), "maps over the same kernel without"]
    return _table("relative to PyTorch's SDPA without maps (cuDNN's in bfloat16)", heads, rows)


def gpu_steps() -> str:
    """The policy loss, a forward pass and a step on a GPU."""
    (capture,), (step,) = _cases("capture", GPU), _cases("end-to-end", GPU)
    losses = [case for case in _cases("policy", GPU) if case["name"] == "policy loss"]
    (large,) = [case for case in _cases("policy", GPU) if case["name"] == "policy loss, large"]
    lines = [
        f"| policy loss, batch 8 of 16x64x64, {case['dtype']}, forward and backward | "
        f"{1e6 * case['times']['ours']['median']:.0f} µs; eager Flow-GRPO {_ratio(case, 'eager_over_ours')} times "
        f"that, the same under torch.compile {_ratio(case, 'compiled_over_ours')} |"
        for case in losses
    ]
    return "\n".join(
        [
            "| on an NVIDIA H200 | |",
            "|---|---|",
            *lines,
            f"| policy loss, batch 64 of 16x128x128, float32 | {_ratio(large, 'copy_over_ours')} of the bandwidth of "
            "a copy |",
            f"| forward pass of SD3.5-M at 1024², batch 2, maps captured, over without | "
            f"{_ratio(capture, 'capture_over_plain')} |",
            f"| rollout and update of SD3.5-M at 512², 4 samples, STAR over plain | "
            f"{_ratio(step, 'star_over_plain')} |",
        ]
    )


def gpu_epilogues() -> str:
    """What maps add to the Triton kernel, by the order of its epilogue."""
    found = json.loads(EPILOGUES.read_text())
    rows = {
        made["epilogue"]: [f"{case['overhead']:.3f}" for case in made["cases"].values()]
        for made in found["epilogues"].values()
    }
    rows |= {
        f"{name}, without the mean over heads": [f"{value:.3f}" for value in values.values()]
        for name, values in found["without_mean_over_heads"].items()
    }
    heads = list(found["epilogues"]["before"]["cases"])
    return _table("Triton's kernel with maps over without, H200, bfloat16", heads, rows)


def demo() -> str:
    """The run of ``make demo`` whose pictures are in docs/pictures."""
    lines = [json.loads(line) for line in DEMO.read_text().splitlines()]
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    epochs = [line for line in lines if line["event"] == "epoch"]
    seconds = sum(value for line in epochs for name, value in line.items() if name.startswith("seconds/"))
    return (
        f"In {len(epochs)} epochs, {seconds / 60:.1f} minutes on one core, the graded reward of held-out prompts "
        f"rises from {evaluations[0]['reward']:.3f} to {evaluations[-1]['reward']:.3f}."
    )


def small_models() -> str:
    """Metrics of the three models that ``star-train-small`` made, the last of which ships."""
    heads = [
        "composition",
        "all fulfilled",
        "text",
        "all fulfilled",
        "correlation of map and object half-way, by block",
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
    return _table("", heads, rows)


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
        tables.append(_table(title, [kind or "cosine" for kind in kinds], rows))
    return "\n\n".join(tables)


def agreement_multiples() -> str:
    """STAR's allocation, "split" and their controls at every policy and task of the study, scaled and along scalar."""
    units = {
        f"{unit['label']}, {unit['key']['task']}": unit["agreement"]
        for unit in _large_units()
        if _says_something(unit) and not unit["key"]["size"]
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
        "object mask (oracle)": "mask of the finished picture",
        "parts off other objects (oracle)": "parts off other objects of the finished picture",
        "parts on own objects (oracle)": "parts on their own objects of the finished picture",
    }
    tables = []
    for kind in (*KINDS, "step"):
        columns = {title: arms for title, arms in units.items() if kind in cosines(arms["scalar"])}
        rows = {}
        for name, title in names.items():
            there = [name in arms and kind in cosines(arms[name]) for arms in columns.values()]
            if any(there):
                values = zip(columns.values(), there, strict=True)
                rows[title] = [str(_times(arms, name, kind)) if known else "" for arms, known in values]
        tables.append(_table(f"{kind}: times the samples", list(columns), rows))
    return "\n\n".join(tables)


def agreement_sizes() -> str:
    """What allocations are worth where one thing is asked for, by its size."""
    units = {size: _unit(f"model C, {size} objects")["agreement"] for size in ("small", "large")}
    rows = {
        name: [str(_times(arms, name, kind)) for kind in KINDS for arms in units.values()]
        for name in units["small"]
        if name != "scalar" and ", step" not in name
    }
    heads = [f"{kind}, {size}" for kind in KINDS for size in units]
    scalar = [_cosine(cosines(arms["scalar"])[kind]) for kind in KINDS for arms in units.values()]
    return _table("times the samples", heads, {"scalar, its cosine": scalar, **rows})


def agreement_steps() -> str:
    """Agreement of single denoising steps, and what weights over steps are worth."""
    arms = _unit("model A, other samples")["agreement"]
    steps = sorted(name for name in arms if name.startswith("scalar, step"))
    rows = {
        f"step {name.split()[-1]}": [str(len(arms[name]["without"])), *(_cosine(arms[name][kind]) for kind in KINDS)]
        for name in steps
    }
    signals = ("contrast", "change", "noise")
    table = _table("scalar advantages, one step alone: cosine", ["batches", *KINDS], rows)
    worth = _table(
        "weights of steps: times the samples",
        ["gradients as they are", *KINDS],
        {name: [str(_times(arms, f"steps by {name}", kind)) for kind in ("", *KINDS)] for name in signals},
    )
    return f"{table}\n\n{worth}"


def agreement_training() -> str:
    """Cosines at the start and after training."""
    units = {name: _unit(f"model C, first two steps{name}")["agreement"] for name in ("", ", after training")}
    rows = {}
    for name in ("scalar", "core, preset blocks", "split", "means of one, preset blocks", "object mask (oracle)"):
        rows[name] = [_cosine(cosines(arms[name])[kind]) for kind in KINDS for arms in units.values()]
    return _table("cosine", [f"{kind}, {when}" for kind in KINDS for when in ("start", "after training")], rows)


def agreement_phrases() -> str:
    """Credit by phrase at model A."""
    arms = _unit("model A")["agreement"]
    rows = {
        "**means of one**, each phrase's part by its own map": "means of one",
        "**phrase**, advantages of phrases, by their maps": "phrases alone",
        "**phrase**, without maps": "phrases without maps",
    }
    learned = [_learned(arm, LEARNING_FIRST) for arm in ("split, means of one", "phrases", "phrases without maps")]
    return _table(
        "times the samples",
        ["gradients as they are", "scaled", "along scalar", "reward after training, beside plain Flow-GRPO"],
        {
            title: [*(str(_times(arms, name, kind)) for kind in ("", *KINDS)), end]
            for (title, name), end in zip(rows.items(), learned, strict=True)
        },
    )


def learning_tuning() -> str:
    """Plain Flow-GRPO under the settings that the second study was chosen from."""
    found = json.loads(TUNING.read_text())
    rows = {}
    for arm, runs in by_arm(found, "composition").items():
        curve = mean_curve(runs)
        own = [" ".join(f"{run['evaluations'][-1][1]:.3f}" for run in runs.values())]
        rows[arm] = [*(f"{reward - curve[0][1]:+.4f}" for _, reward in curve[1:]), *own]
    epochs = [epoch for epoch, _ in curve[1:]]
    return _table("plain Flow-GRPO", [*(f"gain after {epoch} epochs" for epoch in epochs), "final, each seed"], rows)


def learning_table(path: Path) -> str:
    """A study's final rewards, and their differences from plain Flow-GRPO with the same seeds."""
    return f"```text\n{learning_text(json.loads(path.read_text())).strip()}\n```"


def learning_result() -> str:
    """The comparisons of the second study in a sentence each."""
    arms = by_arm(json.loads(LEARNING.read_text()), "composition")
    gain = statistics.mean(run["evaluations"][-1][1] - run["evaluations"][0][1] for run in arms["plain"].values())
    lines = [f"Plain Flow-GRPO gains {gain:.4f}. Final reward beside it:", ""]
    for arm in arms:
        if arm != "plain":
            difference, reach, p = paired(early(arms["plain"], arms[arm]))
            lines.append(
                f"- {arm}: {_learned(arm, LEARNING)}; after {EARLY:g} of the samples {difference:+.4f} ± {reach:.4f} "
                f"(p = {p:.2g}) beside plain's final reward"
            )
    return "\n".join(lines)


def learning_parts() -> str:
    """What the arms of the second study have learnt, part by part."""
    runs = json.loads(PARTS.read_text())["runs"]
    rows = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        means = {name: statistics.mean(run[name] for run in own) for name in ("reward", "phrases", "rest")}
        objects = {name: statistics.mean(run[name] for run in own) for name in ("surplus", "missing")}
        values = [*(f"{value:.3f}" for value in means.values()), *(f"{value:.2f}" for value in objects.values())]
        rows[f"{arm} ({len(own)})" if own[0]["seed"] is not None else arm] = values
    heads = ["reward", "from phrases", "from the rest", "surplus objects", "missing objects"]
    return _table("means over pictures and seeds", heads, rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "attention": attention,
    "policy": policy,
    "steps": steps,
    "demo": demo,
    "small-models": small_models,
    "agreement": agreement,
    "agreement-multiples": agreement_multiples,
    "agreement-phrases": agreement_phrases,
    "agreement-training": agreement_training,
    "agreement-sizes": agreement_sizes,
    "agreement-steps": agreement_steps,
    "learning-tuning": learning_tuning,
    "learning": partial(learning_table, LEARNING),
    "gpu-attention": gpu_attention,
    "gpu-steps": gpu_steps,
    "gpu-epilogues": gpu_epilogues,
    "learning-result": learning_result,
    "learning-parts": learning_parts,
    "learning-text": partial(learning_table, LEARNING_TEXT),
    "learning-ratio": partial(learning_table, LEARNING_RATIO),
    "learning-when": partial(learning_table, LEARNING_WHEN),
    "learning-first": partial(learning_table, LEARNING_FIRST),
}


def pages() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


def render(text: str) -> str:
    """A page with its blocks made anew.

    Raises:
        KeyError: a block of an unknown name.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[4]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a page is out of date")
    options = parser.parse_args(arguments)
    stale = [page for page in pages() if render(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)} {'is out of date' if options.check else 'written'}")
        if not options.check:
            page.write_text(render(page.read_text()))
    return int(options.check and bool(stale))


def _cases(part: str, path: Path = OVERHEAD) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(path.read_text())["parts"][part]
    return cases


def _relative(case: dict[str, Any], name: str) -> str:
    return _three(case["relative"][name]["median"])


def _ratio(case: dict[str, Any], name: str) -> str:
    """With its 95 % interval, or the number of rounds where they are too few for one; what is counted has neither."""
    figure = case["ratios"][name]
    if "count" not in figure:
        return f"{figure['median']:.3f}"
    known = interval_rank(figure["count"]) is not None
    more = f"[{figure['low']:.3f}, {figure['high']:.3f}]" if known else f"({figure['count']} rounds)"
    return f"{figure['median']:.3f} {more}"


def _three(value: float) -> str:
    """Three decimals near one, else three digits at most."""
    if value < 1.1:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 2.5 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _learned(arm: str, path: Path) -> str:
    """An arm's final reward of the composition task less plain's, with its interval and p-value."""
    arms = by_arm(json.loads(path.read_text()), "composition")
    pairs = differences(arms["plain"], arms[arm])
    difference, reach, p = paired(pairs)
    return f"{difference:+.4f} ± {reach:.4f}, p = {p:.2g}, {len(pairs)} seeds"


def _large_units() -> list[dict[str, Any]]:
    """The units of agreement that can tell allocations apart."""
    units = json.loads(AGREEMENT.read_text())["units"]
    return [unit for unit in units if unit["key"]["batches"] * unit["key"]["samples"] >= LARGE]


def _says_something(unit: dict[str, Any]) -> bool:
    """Whether plain Flow-GRPO's own cosine, which multiples are of, is above the noise."""
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


def _table(title: str, heads: Sequence[str], rows: dict[str, list[str]]) -> str:
    lines = [" | ".join(["", title, *heads, ""]).strip(), "|---" * (1 + len(heads)) + "|"]
    lines += [" | ".join(["", name, *cells, ""]).strip() for name, cells in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
