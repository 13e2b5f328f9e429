"""Evaluates a small pipeline: how well images fulfil prompts, and how well attention maps localise objects."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels.capture import attach_maps
from star_kernels.prompts import regions_of, select_tokens
from star_trainer.scenes import TASKS, Scene, check, sample_scene
from star_trainer.scenes.detect import color_masks
from star_trainer.scenes.draw import PALETTE


def held_out(task: str, count: int, seed: str = "held out") -> list[Scene]:
    """Scenes for evaluation, seeded by the arguments."""
    rng = random.Random(f"{seed} {task}")
    return [sample_scene(rng, task) for _ in range(count)]


@torch.no_grad()
def generate(
    pipeline: Any, prompts: Sequence[str], *, steps: int, guidance: float, seed: int = 0, on_step: Any = None
) -> Tensor:
    """Images ``[N, 3, S, S]`` in 0..1, each with a seed of its own.

    Args:
        on_step: callback_on_step_end of the diffusers pipeline.
    """
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + n) for n in range(len(prompts))]
    return pipeline(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        max_sequence_length=1,
        output_type="pt",
        callback_on_step_end=on_step,
    ).images.float()


def scores(pipeline: Any, *, count: int, steps: int, guidance: float, batch: int = 128) -> dict[str, dict[str, float]]:
    """For each task, the mean share of fulfilled conditions and the share of images that fulfil all of them.

    One of the conditions is that nothing else is drawn, as in the images that the model is trained on.
    """
    found = {}
    for task in TASKS:
        asked = held_out(task, count)
        parts = []
        for start in range(0, count, batch):
            some = asked[start : start + batch]
            images = generate(pipeline, [s.prompt for s in some], steps=steps, guidance=guidance, seed=start + 1)
            parts.append(check(images, [s.metadata for s in some], rule="nothing_else"))
        found[task] = {
            "graded": round(torch.cat([p.graded for p in parts]).mean().item(), 4),
            "exact": round(torch.cat([p.exact for p in parts]).float().mean().item(), 4),
        }
    return found


@torch.no_grad()
def localisation(pipeline: Any, *, count: int, steps: int, guidance: float, seed: int = 7) -> Tensor:
    """Pearson correlation between the map of a phrase and its object in the final image, ``[blocks, steps]``.

    The map of each phrase ("red circle") is compared with the mask of its colour in the image. The mean is over phrases
    whose colour no other phrase of the prompt has and which occurs in the image.
    """
    asked = [s for s in held_out("composition", 4 * count) if _distinct(s)][:count]
    prompts, metadata = [s.prompt for s in asked], [s.metadata for s in asked]
    grid = pipeline.transformer.config.sample_size // pipeline.transformer.config.patch_size
    regions = regions_of(pipeline, max_sequence_length=1)
    selection, _ = select_tokens(prompts, regions, metadata=metadata, per_phrase=True)
    maps: list[list[Tensor]] = []
    blocks = range(len(pipeline.transformer.transformer_blocks))
    handles = [attach_maps(pipeline.transformer, selection.to(pipeline.device), blocks=[b]) for b in blocks]

    def keep(_pipeline: Any, _step: int, _time: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        maps.append([handle.take().cpu() for handle in handles])
        return arguments

    try:
        images = generate(pipeline, prompts, steps=steps, guidance=guidance, seed=seed, on_step=keep)
    finally:
        for handle in reversed(handles):
            handle.remove()
    masks = F.adaptive_avg_pool2d(color_masks(images.cpu()), grid)  # [N, colours, g, g]
    wanted, phrases, owners = [], [], []
    for n, scene in enumerate(asked):
        for g, entry in enumerate(scene.metadata["include"]):
            wanted.append(masks[n, list(PALETTE).index(entry["color"])])
            phrases.append(g)
            owners.append(n)
    target = torch.stack(wanted).flatten(1)
    good = target.amax(dim=1) > 0.2
    by_step = [torch.stack([m[owners, phrases].flatten(1)[good] for m in step]) for step in maps]
    return torch.stack([correlation(found, target[good]).mean(dim=-1) for found in by_step], dim=1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation along the last dimension."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt().clamp(min=1e-12)


def _distinct(scene: Scene) -> bool:
    include = scene.metadata["include"]
    return len({entry["color"] for entry in include}) == len(include)
