"""Plot of the results: one panel for each comparison, with times relative to the panel's baseline."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from benchmarks.reporting.summary import BUSY, duration

# Okabe and Ito's palette, which is distinguishable with colour blindness.
OURS, PYTORCH, OTHER = "#0072B2", "#7F7F7F", "#E69F00"
COLOURS = {
    "flash": PYTORCH,
    "efficient": PYTORCH,
    "cudnn": PYTORCH,
    "star": OURS,
    "plain": PYTORCH,
    "captured": OURS,
    "captured_all": OURS,
    **dict.fromkeys(("eager", "compiled", "graphs", "eager_plain", "compiled_plain"), PYTORCH),
    **dict.fromkeys(("eager_captured", "compiled_captured", "graphs_captured"), OURS),
    **dict.fromkeys(("eager_star", "compiled_star"), OURS),
}
LEGEND = {
    "star-kernels": OURS,
    "baseline: PyTorch without maps, or plain Flow-GRPO": PYTORCH,
    "other implementations": OTHER,
}
COLUMNS = 2
HIDDEN = ("map_kernel",)  # does not compute attention


def draw(path: Path, result: dict[str, Any]) -> None:
    cases = [(part, case) for part, found in result["parts"].items() for case in found]
    rows = -(-len(cases) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(14, 1.0 + 2.9 * rows), squeeze=False, layout="constrained")
    for axis, (part, case) in zip(axes.flat, cases, strict=False):
        _panel(axis, part, case)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    environment = result["environment"]
    busy = any(case["disturbed_calls"] >= BUSY for _, case in cases)
    figure.suptitle(
        f"Cost of attention maps and spatial weights on {environment['device_name']}, "
        f"{environment['threads']} threads, torch {environment['versions']['torch']}\n"
        "shorter is better; medians with the 20th and 80th percentile"
        + busy
        * "; other programs used the processor during the run",
        fontsize=13,
    )
    handles = [Patch(color=colour, label=label) for label, colour in LEGEND.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=11, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, part: str, case: dict[str, Any]) -> None:
    names = [name for name in case["times"] if name not in HIDDEN][::-1]
    relative = [case["relative"][name] for name in names]
    values = [row["median"] for row in relative]
    error_bars = [[r["median"] - r["p20"] for r in relative], [r["p80"] - r["median"] for r in relative]]
    colours = [COLOURS.get(name, _colour(name)) for name in names]
    axis.barh(range(len(names)), values, color=colours, height=0.66)
    axis.errorbar(values, range(len(names)), xerr=error_bars, fmt="none", ecolor="black", elinewidth=1, capsize=3)
    axis.set_yticks(range(len(names)), [textwrap.fill(case["times"][name]["label"], 36) for name in names], fontsize=10)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    top = max(row["p80"] for row in relative)
    axis.set_xlim(0, 1.5 * max(1.0, top))
    for y, name in enumerate(names):
        row = case["times"][name]
        axis.text(
            max(1.0, relative[y]["p80"]) + 0.02 * top,
            y,
            f"{_times(values[y])} ({duration(row['median'])})",
            va="center",
            fontsize=10.5,
        )
    baseline = case["times"][case["reference"]]["label"]
    axis.set_xlabel(textwrap.fill(f"time relative to '{baseline}' (dotted line)", 62), fontsize=10)
    title = textwrap.fill(f"{part}: {case['title']}", 74)
    axis.set_title(title, fontsize=10.5, fontweight="bold", loc="left", x=-0.55)
    axis.spines[["top", "right"]].set_visible(False)


def _colour(name: str) -> str:
    if name.startswith("ours"):
        return OURS
    return PYTORCH if name.startswith("sdpa") else OTHER


def _times(ratio: float) -> str:
    return f"{ratio:.3f} x" if ratio < 1.5 else f"{ratio:.1f} x"
