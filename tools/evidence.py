"""Writes measured figures into README, docs and the pages of studies/results: python -m tools.evidence [--check]

Each block between ``<!-- figures: NAME -->`` and ``<!-- end -->`` is generated from the JSON files in
benchmarks/results and studies/results by the function that BLOCKS has for NAME. ``--check`` does not write; it exits
with status 1 if a page differs from the JSON files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reporting.tables import markdown_table
from benchmarks.timing.harness import interval_rank
from studies import tables
from tools.compared.table import comparison

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OVERHEAD = RESULTS / "overhead-amd-epyc-2-threads-avx2.json"
EPOCH = RESULTS / "epoch-amd-epyc-2-threads-avx2.json"
GPU = RESULTS / "overhead-nvidia-h200.json"
EPILOGUES = RESULTS / "epilogue-nvidia-h200.json"
OTHER_WAYS = {  # to attention maps
    "lse_difference": "log-sum-exp difference",
    "augmented_value": "augmented V",
    "materialised": "materialised softmax",
}
STUDIES = ("learning", "learning-text", "learning-ratio", "learning-when", "learning-first")
_BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def attention() -> str:
    """Attention with maps, compared with other ways to compute the maps."""
    columns = {"ours": "ours", **OTHER_WAYS}
    rows = {}
    for case in _cases("attention"):
        heads = re.search(r"batch \d+, (\d+) heads", case["title"])
        part = f"{heads[1]} of 24 heads" if heads and heads[1] != "24" else "batch 2"
        rows[f"{case['name']}, {part}, {case['dtype']}"] = [_relative(case, name) for name in columns]
    return markdown_table(
        "attention with maps of 8 tokens, relative to PyTorch's SDPA without maps", list(columns.values()), rows
    )


def policy() -> str:
    """The time of the policy loss."""
    columns = {
        "ours": "ours",
        "ours_weighted": "ours, with weights",
        "eager": "eager Flow-GRPO",
        "compiled": "Flow-GRPO with torch.compile",
    }
    rows = {
        case["dtype"]: [f"{1e3 * case['times'][name]['median']:.2f} ms" for name in columns]
        for case in _cases("policy")
    }
    return markdown_table("policy loss, forward and backward, batch 8 of 16x64x64", list(columns.values()), rows)


def steps() -> str:
    """Memory of the loss, and the overhead of STAR in a forward pass, a training step and an epoch."""
    memory = [case["ratios"]["memory_over_gradient_eager"]["median"] for case in _cases("policy")]
    (capture,), (step,), (epoch,) = _cases("capture")[-1:], _cases("end-to-end"), _cases("epoch", EPOCH)
    return "\n".join(
        [
            f"The loss allocates the memory of one gradient; eager Flow-GRPO allocates that of {memory[0]:.0f} "
            f"(float32) to {memory[1]:.0f} (bfloat16) gradients.",
            "",
            "| with STAR, relative to the same without | time | peak memory |",
            "|---|---|---|",
            f"| forward pass of {capture['size']['blocks']} blocks of SD3.5-M at 1024², with captured maps | "
            f"{_ratio(capture, 'capture_over_plain')} | {_ratio(capture, 'capture_memory')} |",
            f"| rollout and update of 2 blocks of SD3.5-M at 256² | {_ratio(step, 'star_over_plain')} | |",
            f"| epoch of star-train with the small model, rewards included | {_ratio(epoch, 'star_over_plain')} | "
            f"{_ratio(epoch, 'star_memory')} |",
            f"| the same epoch, from the separately timed parts that STAR adds | {_ratio(epoch, 'star_by_parts')} | |",
        ]
    )


def gpu_attention() -> str:
    """Attention with maps on a GPU, and the overhead of the maps: our ways, then other ways to compute the maps."""
    ours, others = {}, {}
    for case in _cases("attention", GPU):
        name = f"{case['name']}, batch {case['batch']}, {case['dtype']}"
        flash = _relative(case, "sdpa_flash") if "sdpa_flash" in case["relative"] else ""
        ours[name] = [
            f"{1e3 * case['times']['sdpa']['median']:.2f} ms",
            flash,
            _relative(case, "ours"),
            _three(case["ratios"]["overhead"]["median"]),
        ]
        others[name] = [_relative(case, other) for other in ("ours", *OTHER_WAYS)]
    title = "relative to PyTorch's SDPA without maps (cuDNN in bfloat16)"
    heads = ["PyTorch's SDPA", "flash without maps", "ours, with maps", "ours with maps / without"]
    ways = ["ours", *OTHER_WAYS.values()]
    return "\n\n".join([markdown_table(title, heads, ours), markdown_table("ways to compute maps", ways, others)])


def gpu_steps() -> str:
    """The policy loss, a forward pass and a training step on a GPU."""
    (capture,), (step,) = _cases("capture", GPU)[-1:], _cases("end-to-end", GPU)  # at 1024²
    losses = [case for case in _cases("policy", GPU) if case["name"] == "policy loss"]
    (large,) = [case for case in _cases("policy", GPU) if case["name"] == "policy loss, large"]
    lines = [
        f"| policy loss, batch 8 of 16x64x64, {case['dtype']}, forward and backward | "
        f"{1e6 * case['times']['ours']['median']:.0f} µs; eager Flow-GRPO takes {_ratio(case, 'eager_over_ours')} "
        f"times as long, with torch.compile {_ratio(case, 'compiled_over_ours')} times |"
        for case in losses
    ]
    return "\n".join(
        [
            "| on an NVIDIA H200 | |",
            "|---|---|",
            *lines,
            f"| policy loss, batch 64 of 16x128x128, float32 | {_ratio(large, 'copy_over_ours')} of the bandwidth of "
            "a copy |",
            f"| forward pass of SD3.5-M at 1024², batch 2, with captured maps / without | "
            f"{_ratio(capture, 'capture_over_plain')} |",
            f"| rollout and update of SD3.5-M at 512², 4 samples, STAR / plain Flow-GRPO | "
            f"{_ratio(step, 'star_over_plain')} |",
        ]
    )


def gpu_epilogues() -> str:
    """The overhead of maps in the Triton kernel, for several orders of its epilogue."""
    found = json.loads(EPILOGUES.read_text())
    rows = {
        f"{made['epilogue']}, the mean over heads in the kernel": [
            f"{case['overhead']:.3f}" for case in made["cases"].values()
        ]
        for made in found["epilogues"].values()
    }
    rows |= {
        f"{name}, without the mean over heads": [f"{value:.3f}" for value in values.values()]
        for name, values in found["without_mean_over_heads"].items()
    }
    heads = list(found["epilogues"]["before"]["cases"])
    return markdown_table("Triton kernel with maps / without, H200, bfloat16", heads, rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "comparison": comparison,
    "attention": attention,
    "policy": policy,
    "steps": steps,
    "gpu-attention": gpu_attention,
    "gpu-steps": gpu_steps,
    "gpu-epilogues": gpu_epilogues,
    "demo": tables.demo,
    "small-models": tables.small_models,
    "agreement": tables.agreement,
    "agreement-multiples": tables.agreement_multiples,
    "agreement-phrases": tables.agreement_phrases,
    "agreement-training": tables.agreement_training,
    "agreement-sizes": tables.agreement_sizes,
    "agreement-steps": tables.agreement_steps,
    "learning-tuning": tables.learning_tuning,
    "missing-objects": tables.missing_objects,
    "missing-objects-result": tables.missing_objects_result,
    "missing-objects-steps": tables.missing_objects_steps,
    "noise-limits": tables.noise_limits,
    "noise-scale": tables.noise_scale,
    "learning-result": partial(tables.learning_result, share=True),
    "learning-parts": tables.learning_parts,
    **{study: partial(tables.learning_table, tables.RESULTS / f"{study}.json") for study in STUDIES},
    **{
        f"{study}-result": partial(tables.learning_result, tables.RESULTS / f"{study}.json")
        for study in STUDIES
        if study != "learning"
    },
}


def pages() -> Iterator[Path]:
    """The pages that may have generated blocks."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))
    yield from sorted(tables.RESULTS.glob("*.md"))


def render(text: str) -> str:
    """Returns the text of a page with its blocks generated from the JSON files.

    Raises:
        KeyError: if the name of a block is unknown.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[4]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="do not write; exit with status 1 if a page is out of date"
    )
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
    """A ratio with its 95 % interval, or with the number of rounds if it is too small for an interval.

    A number that is counted rather than timed has neither.
    """
    figure = case["ratios"][name]
    if "count" not in figure:
        return f"{figure['median']:.3f}"
    known = interval_rank(figure["count"]) is not None
    more = f"[{figure['low']:.3f}, {figure['high']:.3f}]" if known else f"({figure['count']} rounds)"
    return f"{figure['median']:.3f} {more}"


def _three(value: float) -> str:
    """Three decimals if the value is near one, otherwise at most three digits."""
    if value < 1.1:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 2.5 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
