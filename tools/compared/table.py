"""The comparison of packages in README, from benchmarks/results/compare-maps.json."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.reporting.tables import markdown_table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/compare-maps.json"
MIB, WIDTH = 2**20, 138
LABELS = {"sd3": "SD3.5", "unet": "UNet"}
LINKS = {
    "attention-map-diffusers": "https://github.com/wooyeolBaek/attention-map-diffusers",
    "daam": "https://github.com/castorini/daam",
    "flow-grpo": "https://github.com/yifan123/flow_grpo",
    "verl-omni": "https://github.com/verl-project/verl-omni",
}
NAMES = {"daam": "DAAM", "flow-grpo": "Flow-GRPO", "verl-omni": "VeRL-Omni"}
# Of the READMEs of the packages, at the commits of the results.
SUPPORTED = {
    "star-kernels": "SD3.5, FLUX, Qwen-Image, Wan, SDXL, [others](docs/models.md)",
    "attention-map-diffusers": "SD3.5, SD3, FLUX.1, SDXL, SD 2",
    "daam": "SDXL, SD 2, SD 1",
}
HEADS = (
    "maps of",
    "time of a pass with maps / without",
    "peak memory added",
    "losses on maps",
    "advantage of a sample",
)


def comparison() -> str:
    """The table and how it was measured."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = {_name(name, row): _package(name, row) for name, row in found["packages"].items()}
    rows |= {_name(name, row): ["none", "", "", "", row["credit"]] for name, row in found["trainers"].items()}
    return "\n\n".join([markdown_table("", list(HEADS), rows), _method(found)])


def _name(name: str, row: dict[str, Any]) -> str:
    if name not in LINKS:
        return f"**{name}**"
    return f"[{NAMES.get(name, name)}]({LINKS[name]}/tree/{row['commit'][:7]})"


def _package(name: str, row: dict[str, Any]) -> list[str]:
    ours = name not in LINKS
    models = row["models"]
    times = ", ".join(f"{LABELS[key]} {made['time_over_plain']:.1f}" for key, made in models.items())
    memory = ", ".join(f"{LABELS[key]} {_mebibytes(made['peak_bytes_added'])}" for key, made in models.items())
    gradient = "yes" if all(made["differentiable"] for made in models.values()) else "no"
    return [SUPPORTED[name], times, memory, gradient, "a weight for each location and step" if ours else ""]


def _mebibytes(size: int) -> str:
    return "0" if size <= 0 else "under 1 MiB" if size < MIB else f"{size / MIB:.0f} MiB"


def _method(found: dict[str, Any]) -> str:
    packages, ours = found["packages"], found["packages"]["star-kernels"]
    others = {row["versions"]["diffusers"] for name, row in packages.items() if name in LINKS}
    same = [m["output_identical"] for m in ours["models"].values()]
    differences = [m["output_difference"] for n, p in packages.items() if n in LINKS for m in p["models"].values()]
    output = "ours keeps the output bit for bit" if all(same) else "no package keeps the output bit for bit"
    rest = f"the others change it by up to {max(differences):.0e} of its largest value"
    text = (
        f"`python -m tools.compare_maps`, on one thread of an {ours['processor']} that other programs shared: two "
        "blocks of SD3.5-Medium and a small UNet of SD with random weights, float32, one image of 512² with guidance; "
        "the least processor time of several passes, which varies by a tenth. Ours makes maps of two phrases, the "
        f"others of every token and head. {output[0].upper()}{output[1:]}; {rest}. diffusers "
        f"{ours['versions']['diffusers']} for ours, {' and '.join(sorted(others))} for the others. The trainers were "
        "read, not run, at the linked commits. On a GPU: [benchmarks](docs/benchmarks.md#results)."
    )
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
