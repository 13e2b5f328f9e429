"""``star-train-small``: trains the small Stable Diffusion 3 from scratch; writes metrics, figures and model card."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_trainer.small.card import model_card
from star_trainer.small.recipe import LARGE, SMALL, Recipe

RECIPES = {"small": SMALL, "large": LARGE}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns 0."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    recipe = Recipe(**options.recipe.as_dict())
    train(recipe, Path(options.out), torch.device(options.device), options.evaluate, command_line(options))
    return 0


def parse(arguments: list[str]) -> Any:
    from docstring_parser import DocstringStyle
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_style=DocstringStyle.GOOGLE)
    parser = ArgumentParser(prog="star-train-small", description=__doc__)
    parser.add_argument("--size", choices=sorted(RECIPES), default="small", help="base recipe")
    parser.add_argument("--out", default="small-sd3", help="output folder of the pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--evaluate", type=int, default=512, help="number of prompts per task for the metrics")
    parser.add_class_arguments(Recipe, "recipe")
    size = parser.parse_args(arguments).size
    parser.set_defaults({f"recipe.{name}": value for name, value in asdict(RECIPES[size]).items()})
    return parser.parse_args(arguments)


def command_line(options: Any) -> str:
    """The shortest command line that selects the same recipe; --out, --device and --evaluate are left out."""
    base = asdict(RECIPES[options.size])
    given = options.recipe.as_dict()
    changed = [f"--recipe.{k} {given[k]}" for k in base if tuple_or(given[k]) != tuple_or(base[k])]
    return " ".join(["star-train-small", f"--size {options.size}", *changed])


def tuple_or(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def train(recipe: Recipe, folder: Path, device: torch.device, evaluated: int, command: str) -> dict[str, Any]:
    """Trains, evaluates and writes the pipeline. Returns the metrics."""
    from star_trainer.small.autoencoder import train_autoencoder
    from star_trainer.small.evaluate import localisation, scores
    from star_trainer.small.flow import train_flow
    from star_trainer.small.pipeline import build

    started = time.perf_counter()
    pipeline = build(recipe)
    error = train_autoencoder(pipeline.vae, recipe, device)
    loss = train_flow(pipeline, recipe, device)
    trained = time.perf_counter()
    pipeline.to(device)
    drawing: dict[str, Any] = {"steps": recipe.sampling_steps, "guidance": recipe.guidance}
    table = localisation(pipeline, count=128, **drawing)
    metrics = {
        "command": command,
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "training_minutes": round((trained - started) / 60, 1),
        "autoencoder_error": round(error, 5),
        "flow_matching_loss": round(loss, 5),
        "scenes": scores(pipeline, count=evaluated, **drawing),
        "localisation": [[round(value, 3) for value in row] for row in table.tolist()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (folder / "README.md").write_text(model_card(metrics))
    draw_samples(pipeline, recipe).savefig(folder / "samples.png", dpi=90)
    draw_localisation(table).savefig(folder / "localisation.png", dpi=100)
    print(json.dumps({name: metrics[name] for name in ("training_minutes", "autoencoder_error", "scenes")}, indent=1))
    return metrics


def draw_samples(pipeline: Any, recipe: Recipe) -> Any:
    """A grid of samples for held-out prompts of both tasks."""
    from star_trainer.record import grid
    from star_trainer.scenes import TASKS
    from star_trainer.small.evaluate import generate, held_out

    prompts = [scene.prompt for task in TASKS for scene in held_out(task, 16, "pictures")]
    images = generate(pipeline, prompts, steps=recipe.sampling_steps, guidance=recipe.guidance)
    return grid(list(images.cpu()), prompts, columns=8)


def draw_localisation(table: Tensor) -> Any:
    """Correlation of map and object over steps, one line per block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axis = figure.subplots()
    shades = ["#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999"]
    for block, row in enumerate(table.tolist()):
        axis.plot(row, label=f"block {block}", color=shades[block % len(shades)])
    axis.plot(table.mean(dim=0).tolist(), label="mean of blocks' scores", color="black", linestyle=":")
    axis.set(xlabel="denoising step", ylabel="correlation of map and object", ylim=(min(0.0, table.min().item()), 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=2)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
