"""Plots of the results: one picture for each question, with times relative to the baseline of each comparison.

    python -m benchmarks.reporting.plot benchmarks/results/overhead-*.json

draws the pictures of a file of results again.
"""

from __future__ import annotations

import json
import sys
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
LEGEND = {"star-kernels": OURS, "PyTorch, or plain Flow-GRPO": PYTORCH, "other ways": OTHER}
# The first does not compute attention; the others are slower than or equal to PyTorch's choice.
HIDDEN = ("map_kernel", "sdpa_efficient", "sdpa_cudnn")
# Pictures: name, question, and the parts of the benchmark that answer it.
QUESTIONS = {
    "attention": ("What do maps cost in attention?", ("attention",)),
    "backward": ("What does the backward pass of attention cost?", ("backward",)),
    "policy": ("What does the policy loss cost?", ("policy",)),
    "host": ("What do Python and the dispatcher cost?", ("host",)),
    "training": ("What does STAR cost in a model and in training?", ("capture", "compiled", "end-to-end", "epoch")),
}
WIDTH = 6.4  # inches; at 400 px a line of text is 10 px high
BAR, FRAME = 0.36, 1.15  # inches of a bar, and of the title and the axis of a panel
LONGEST = 4.0  # times the baseline; longer bars are cut and marked


def draw(path: Path, result: dict[str, Any]) -> list[Path]:
    """Writes a picture for each question that has results; ``path`` is their name without the question."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (question, parts) in QUESTIONS.items():
        cases = [case for part in parts for case in result["parts"].get(part, [])]
        if cases:
            written.append(path.with_name(f"{path.stem}-{name}.png"))
            _picture(written[-1], question, cases, result["environment"])
    return written


def _picture(path: Path, question: str, cases: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    heights = [FRAME + BAR * len(_names(case)) for case in cases]
    figure, axes = plt.subplots(
        len(cases),
        figsize=(WIDTH, 1.6 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, case in zip(axes[:, 0], cases, strict=True):
        _panel(axis, case)
    where = f"{environment['device_name']}, {environment['threads']} threads, torch {environment['versions']['torch']}"
    busy = "; other programs used the processor" if any(case["disturbed_calls"] >= BUSY for case in cases) else ""
    about = textwrap.fill(f"shorter is better; medians with the 20th and 80th percentile{busy}", 58)
    figure.suptitle(f"{question}\n{where}\n{about}", fontsize=12)
    used = {_colour(name) for case in cases for name in _names(case)}
    handles = [Patch(color=colour, label=label) for label, colour in LEGEND.items() if colour in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=11, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, case: dict[str, Any]) -> None:
    names = _names(case)[::-1]
    relative = [case["relative"][name] for name in names]
    values = [row["median"] for row in relative]
    end = min(LONGEST, 1.1 * max(1.0, *(row["p80"] for row in relative)))
    axis.barh(range(len(names)), [min(v, end) for v in values], color=[_colour(name) for name in names], height=0.66)
    for y, (name, row) in enumerate(zip(names, relative, strict=True)):
        cut = row["median"] > end
        if not cut:
            low, high = row["median"] - row["p20"], min(row["p80"], end) - row["median"]
            axis.errorbar(row["median"], y, xerr=[[low], [high]], ecolor="black", elinewidth=1, capsize=3)
        text = f"{_times(row['median'])}{' →' if cut else ''}  ({duration(case['times'][name]['median'])})"
        axis.text(min(max(1.0, row["p80"]), end) + 0.03 * end, y, text, va="center", fontsize=10.5)
    labels = [textwrap.fill(case["times"][name]["label"], 22) for name in names]
    axis.set_yticks(range(len(names)), labels, fontsize=10.5)
    for name, label in zip(names, axis.get_yticklabels(), strict=True):
        if _colour(name) == OURS:
            label.set_color(OURS)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, 1.75 * end)  # the numbers are beside the bars
    axis.set_xticks(list(range(int(end) + 1)))
    axis.set_xlabel(f"time / time of: {case['times'][case['reference']]['label']}", fontsize=10, loc="left")
    axis.set_title(textwrap.fill(case["title"], 44), fontsize=11, fontweight="bold", loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _names(case: dict[str, Any]) -> list[str]:
    return [name for name in case["times"] if name not in HIDDEN]


def _colour(name: str) -> str:
    if name in COLOURS or name.startswith("ours"):
        return COLOURS.get(name, OURS)
    return PYTORCH if name.startswith("sdpa") else OTHER


def _times(ratio: float) -> str:
    return f"{ratio:.3f} x" if ratio < 1.5 else f"{ratio:.1f} x"


def main(arguments: list[str] | None = None) -> None:
    for file in map(Path, sys.argv[1:] if arguments is None else arguments):
        print(*draw(file.with_suffix(".png"), json.loads(file.read_text(encoding="utf-8"))), sep="\n")


if __name__ == "__main__":
    main()
