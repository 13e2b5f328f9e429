"""Measures which parts of the reward the runs of studies.learning have learned: python -m studies.learning_parts

For the last checkpoint of each run, it samples images of held-out prompts and measures the contribution of the phrases
to the reward, the contribution of the rest (no other objects in the image, by the rule "nothing_else"), and the numbers
of surplus and missing objects. The first row, with the arm "start", is the untrained small model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from benchmarks.reporting import environment
from star_trainer import checkpoint
from star_trainer.command import parse as parse_settings
from star_trainer.config import Config
from star_trainer.policy import Policy
from star_trainer.prompts import Prompt, load_prompts
from star_trainer.rewards.images import slices
from star_trainer.rollout import sample
from star_trainer.scenes import SceneReward
from star_trainer.scenes.detect import detect_shapes
from studies import learning

BATCH = 64


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    design = yaml.safe_load(options.design.read_text())
    config = parse_settings([f"--{name}={value}" for name, value in design["settings"].items()])
    policy = Policy(config, torch.device("cpu"))
    prompts = load_prompts("scenes:composition", seed="parts")[: options.prompts]
    rows = [{"arm": "start", "seed": None, **judge(policy, prompts, config)}]
    for unit in learning.units(design):
        found = checkpoint.find(unit.folder(options.runs))
        if unit.task == "composition" and found:
            policy.model.load_state_dict(load_file(found[-1] / "average.safetensors"), strict=False)
            rows.append({"arm": unit.arm, "seed": unit.seed, **judge(policy, prompts, config)})
            print(json.dumps(rows[-1]), flush=True)
    header = {"prompts": len(prompts), "environment": environment.describe(torch.device("cpu"))}
    options.out.write_text(json.dumps({**header, "runs": rows}, indent=1) + "\n")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.learning_parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--design", type=Path, default=learning.DESIGNS / "main.yaml", help="YAML file of the design")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="folder of the runs")
    parser.add_argument("--prompts", type=int, default=512, help="number of held-out prompts (default: 512)")
    parser.add_argument(
        "--out", type=Path, default=learning.RESULTS / "learning-parts.json", help="JSON file of the results"
    )
    return parser.parse_args(arguments)


def judge(policy: Policy, prompts: list[Prompt], config: Config) -> dict[str, Any]:
    """Mean rewards and counts over images that are sampled without noise, from the same initial latents each time."""
    autocast = Accelerator(cpu=True).autocast
    images = torch.cat(
        [
            sample(policy, prompts[rows], [f"parts {n}" for n in range(rows.start, rows.stop)], config, autocast)
            for rows in slices(len(prompts), BATCH)
        ]
    )
    reward = SceneReward(**config.reward.options.get("scene", {}))
    rewards, by_phrase = reward.by_phrase(images, [p.text for p in prompts], [p.metadata for p in prompts])
    wanted = torch.tensor([sum(int(entry["count"]) for entry in p.metadata["include"]) for p in prompts])
    more = torch.tensor([len(shapes) for shapes in detect_shapes(images)]) - wanted
    phrases = by_phrase.nansum(dim=1)
    means = {
        "reward": rewards,
        "phrases": phrases,
        "rest": rewards - phrases,
        "surplus": more.clamp(min=0).float(),
        "missing": (-more).clamp(min=0).float(),
    }
    return {name: round(values.mean().item(), 4) for name, values in means.items()}


if __name__ == "__main__":
    sys.exit(main())
