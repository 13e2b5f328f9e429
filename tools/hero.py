"""Draws README's first picture from the small model and the committed measurement: python -m tools.hero

Above: an image of the small model that ships with star_trainer, and the maps of two phrases of its prompt. The seed is
the first one whose image the exact checker of scenes accepts. Below: the time of attention with maps on an NVIDIA H200,
from benchmarks/results/overhead-nvidia-h200.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from star_kernels import figures
from star_kernels.maps import Drawing, draw
from star_kernels.pipelines import load_pipeline
from star_trainer.policy import SHIPPED
from star_trainer.scenes import SceneReward
from star_trainer.scenes.describe import Thing, describe

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "benchmarks/results/overhead-nvidia-h200.json"
CASE = "SD3.5-M 1024²"
THINGS = (Thing("circle", "blue"), Thing("triangle", "red"))
PHRASES = ["blue circle", "red triangle"]
BLOCKS = [0, 1]  # of the small model: their maps localise objects best
STEPS, SEEDS = 8, 32
BARS = {  # variant -> label
    "sdpa": "PyTorch, without maps",
    "ours": "star-kernels, with maps",
    "augmented_value": "columns added to V",
    "lse_difference": "attention twice",
    "materialised": "softmax materialised",
}
OURS, OTHERS, BASELINE = "#0072B2", "#E69F00", "#7F7F7F"
LONGEST = 4.0  # longer bars are cut


def accepted_drawing(pipeline: Any) -> tuple[Drawing, str, int]:
    """The drawing of the first seed whose image fulfils the prompt, the prompt and the seed."""
    prompt, metadata = describe(THINGS)
    reward = SceneReward(strict=True, rule="nothing_else")
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0}
    generators = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
    found = pipeline(prompt=[prompt] * SEEDS, generator=generators, output_type="pt", **call).images.float()
    scores = reward(found, [prompt] * SEEDS, [metadata] * SEEDS)
    if not scores.any():
        raise RuntimeError(f"no image of the seeds 0 to {SEEDS - 1} fulfils {prompt!r}")
    seed = int(scores.argmax())
    generator = torch.Generator().manual_seed(seed)
    return draw(pipeline, prompt, phrases=PHRASES, blocks=BLOCKS, generator=generator, **call), prompt, seed


def measured() -> tuple[dict[str, float], str]:
    """Time of each of BARS relative to PyTorch's attention without maps, and what was measured."""
    result = json.loads(MEASURED.read_text())
    case = next(c for c in result["parts"]["attention"] if c["name"] == CASE and c["batch"] == 2)
    where = result["environment"]
    about = f"{where['device_name']}, {case['dtype']}"
    return {
        name: case["relative"][name]["median"] for name in BARS
    }, f"time of attention in SD3.5-Medium at 1024², {about}"


def hero(drawing: Drawing, prompt: str) -> Figure:
    figure = Figure(figsize=(14, 9), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    upper.suptitle(f"“{prompt}”", fontsize=27)
    axes = upper.subplots(1, 1 + len(PHRASES))
    shared = figures.to_rgb(drawing.image)
    axes[0].imshow(shared, interpolation="bicubic")
    axes[0].set_title("image", fontsize=25)
    for axis, grid, phrase in zip(axes[1:], drawing.maps.mean(dim=0), drawing.names, strict=True):
        axis.imshow(figures.over(shared, grid / grid.max()), interpolation="bicubic")
        axis.set_title(f"map of “{phrase}”", fontsize=25)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    values, title = measured()
    chart = lower.subplots()
    colours = {"sdpa": BASELINE, "ours": OURS}
    for row, (name, label) in enumerate(BARS.items()):
        value = values[name]
        chart.barh(row, min(value, LONGEST), color=colours.get(name, OTHERS), height=0.72)
        cut = "  →" if value > LONGEST else ""
        chart.text(min(value, LONGEST) + 0.04, row, f"{value:.2f} x{cut}", va="center", fontsize=24)
        chart.text(-0.04, row, label, va="center", ha="right", fontsize=23, weight="bold" if name == "ours" else None)
    chart.axvline(1.0, color="black", linewidth=1, linestyle=":")
    chart.set(xlim=(0, LONGEST + 0.7), xticks=[], yticks=[])
    chart.invert_yaxis()
    chart.spines[:].set_visible(False)
    lower.suptitle(title, fontsize=24)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.hero", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/hero.png", help="the file to write")
    options = parser.parse_args(arguments)
    pipeline = load_pipeline(str(SHIPPED), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawing, prompt, seed = accepted_drawing(pipeline)
    hero(drawing, prompt).savefig(options.out, dpi=100)
    print(f"{options.out}: {prompt}, seed {seed}")


if __name__ == "__main__":
    main()
