"""What STAR costs an epoch of the driver: rollout, rewards and update of the small model that ships."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from clocks import CpuClock
from harness import Budget, Progress, Variant, interleave
from policy_overhead import peak_memory

from star_trainer.command import PRESETS
from star_trainer.config import Config
from star_trainer.trainer import Trainer

GROUPS = 8  # of the preset's size: what an epoch does scales with them
QUICK = {"groups": 1, "group_size": 2, "batch": 2}


def measure(
    device: torch.device, dtypes: list[torch.dtype] | None, batch: int | None, budget: Budget, quick: bool
) -> list[dict[str, Any]]:
    """Always float32: the small model trains in nothing else."""
    preset = _preset("small")
    changes = QUICK if quick else {"groups": GROUPS, "batch": batch or preset.rollout.batch}
    config = replace(
        preset,
        rollout=replace(preset.rollout, **changes),
        evaluation=replace(preset.evaluation, every=0, prompts=1),
        output=replace(preset.output, pictures_every=0, tensorboard=False),
    )
    with tempfile.TemporaryDirectory() as folder:
        return [measure_case(config, device, budget, folder, quick)]


def measure_case(config: Config, device: torch.device, budget: Budget, folder: str, quick: bool) -> dict[str, Any]:
    title = f"epoch of the driver · small model · {config.rollout.groups} groups of {config.rollout.group_size}"
    with Progress(f"{title} · building", 0):
        trainers = {method: _trainer(config, method, device, folder) for method in ("plain", "star")}
    variants = [
        Variant("plain", "epoch, plain Flow-GRPO", trainers["plain"].train_epoch),
        Variant("star", "epoch with STAR", trainers["star"].train_epoch),
    ]
    clock = CpuClock(device)
    times = interleave(variants, clock, budget, title, warm_up=1)
    peaks = {method: peak_memory(trainer.train_epoch, device) for method, trainer in trainers.items()}
    return {
        "name": "smoke test" if quick else "epoch of the driver",
        "title": f"driver, preset small, float32: {config.rollout.groups} groups of {config.rollout.group_size}, "
        f"{config.rollout.steps} steps, {config.rollout.window or config.rollout.steps - 1} of them trained",
        "dtype": "float32",
        "clock": clock.name,
        **times.columns(variants, "plain"),
        "ratios": {
            "star_over_plain": {
                "label": "OVERHEAD epoch with STAR / without",
                **times.ratio("star", "plain").as_dict(),
            },
            "star_memory": {"label": "peak memory: with STAR / without", "median": peaks["star"] / peaks["plain"]},
        },
        "notes": [*filter(None, (times.note,))],
    }


def _preset(name: str) -> Config:
    made = Config()
    values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    return replace(made, **{part: replace(getattr(made, part), **options) for part, options in values.items()})


def _trainer(config: Config, method: Any, device: torch.device, folder: str) -> Trainer:
    chosen = replace(
        config,
        allocation=replace(config.allocation, method=method),
        output=replace(config.output, folder=f"{folder}/{method}"),
    )
    return Trainer(chosen, Accelerator(cpu=device.type == "cpu"), progress=False)
