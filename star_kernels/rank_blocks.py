"""Ranks the attention blocks of a model by how well their maps find the words of prompts, without a segmentation model.

An image is generated for each prompt, and the maps of its phrases are captured in each block at every step, on the
finest grid of the model's blocks. Each block has two scores:

- *Concentration*: 1 - perplexity / P for a map of P positions, where the perplexity is the exponential of the entropy
  of the map divided by its sum: 0 for a uniform map, 1 - 1/P for a map that is zero in all positions but one.
- *Agreement*: Pearson's correlation, over positions, of the map with a reference that describes the final image: the
  mean of the maps of the same phrase over all *other* blocks and over the last quarter of the steps (rounded up), each
  map standardised to a mean of zero and a standard deviation of one, so that sharp maps do not outweigh the others.

Both are averaged over steps, phrases and prompts. A flat map hardly moves credit, and a sharp map that does not agree
moves it to the wrong positions. So blocks are ordered by the sum of their ranks in both scores; of equal sums, the
block with the higher agreement is first. The best blocks are the first five of those with a positive agreement: arXiv
2508.07519 averages the five best blocks of each model, which it finds by segmentation masks. Without such masks, the
reference is only what most blocks find: look at the maps before you rely on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels.generation import arguments_of_call, denoisers, generate

BEST = 5  # the number of blocks to average


@dataclass(frozen=True)
class Score:
    """The scores of a block."""

    block: int
    concentration: float
    agreement: float


@dataclass(frozen=True)
class Ranking:
    """The blocks of a model, best first."""

    scores: tuple[Score, ...]

    @property
    def best(self) -> list[int]:
        """The first five blocks with a positive agreement, in the order in which they run; the first block if none."""
        agreeing = [score.block for score in self.scores if score.agreement > 0]
        return sorted(agreeing[:BEST]) or [self.scores[0].block]

    def table(self) -> str:
        """The scores, and the option to copy."""
        rows = [f"{s.block:>5}  {s.concentration:>13.3f}  {s.agreement:>9.3f}" for s in self.scores]
        return "\n".join(["block  concentration  agreement", *rows, f"blocks={self.best}"])

    def as_dict(self) -> dict[str, Any]:
        return {"blocks": self.best, "scores": [asdict(score) for score in self.scores]}


def rank_blocks(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    phrases: list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    max_sequence_length: int | None = None,
    generator: torch.Generator | None = None,
    **call: Any,
) -> Ranking:
    """Generates an image for each prompt and ranks all blocks, see the module's documentation.

    Args:
        pipeline: a text-to-image pipeline that :func:`star_kernels.prompts.regions_of` supports.
        prompts: the prompts.
        phrases: the phrases to map, each of which must occur in every prompt; each prompt's core content by default.
        height, width, num_inference_steps, guidance_scale, max_sequence_length, generator: arguments of the pipeline
            calls; the pipeline's defaults if None.
        call: further arguments of the calls that this pipeline accepts, such as ``negative_prompt``.

    Raises:
        TypeError, ValueError: unsupported pipeline, a model with fewer than two blocks, or a phrase that a prompt does
            not contain; the message names it.
    """
    from star_kernels.capture import attach_maps

    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}")
    models = denoisers(pipeline)
    if len(models) > 1:
        raise ValueError(
            f"the blocks of one model can be ranked, got a pipeline of {len(models)}: set its transformer_2 and its "
            "boundary_ratio to None to rank those of transformer"
        )
    with attach_maps(models[0], blocks="all") as everything:
        blocks = everything.blocks
    if len(blocks) < 2:
        raise ValueError(f"the model must have at least two attention blocks to rank, got {len(blocks)}")
    common = arguments_of_call(
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        max_sequence_length=max_sequence_length,
        generator=generator,
    )
    maps = []
    for prompt in prompts:
        found = generate(pipeline, prompt, phrases, [[block] for block in blocks], {**common, **call}).maps
        finest = max((part.shape[1:] for part in found[0]), key=math.prod)
        maps.append(torch.stack([torch.stack([_on_grid(part, finest) for part in step]) for step in found]))
    return rank(maps)


def rank(maps: Sequence[Tensor]) -> Ranking:
    """Ranks blocks by their maps, for each image ``[Steps, blocks, G, h, w]``, or video ``[.., G, f, h, w]``."""
    concentrations = torch.cat([concentration(image) for image in maps], dim=1).mean(dim=1)
    agreements = torch.cat([agreement(image) for image in maps], dim=1).mean(dim=1)
    places = _places(concentrations) + _places(agreements)
    scores = [
        Score(block, round(float(concentrations[block]), 4), round(float(agreements[block]), 4))
        for block in range(len(places))
    ]
    return Ranking(tuple(sorted(scores, key=lambda s: (int(places[s.block]), -s.agreement))))


def concentration(maps: Tensor) -> Tensor:
    """1 - perplexity / P of maps ``[Steps, blocks, G, h, w]``: mean over steps, ``[blocks, G]``."""
    share = maps.double().flatten(3)
    share = share / share.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    perplexity = torch.exp(-torch.special.xlogy(share, share).sum(dim=-1))
    return (1 - perplexity / share.shape[-1]).mean(dim=0)


def agreement(maps: Tensor) -> Tensor:
    """Correlation of maps ``[Steps, blocks, G, h, w]`` with the other blocks' last maps, ``[blocks, G]``."""
    standard = _standardised(maps.double().flatten(3))  # [Steps, blocks, G, P]
    last = standard[-math.ceil(len(standard) / 4) :].mean(dim=0)
    others = _standardised(last.sum(dim=0) - last)
    return (standard * others).mean(dim=-1).mean(dim=0)


def _standardised(maps: Tensor) -> Tensor:
    """Maps ``[..., P]`` with a mean of zero and a standard deviation of one over positions; zero if constant."""
    mean = maps.mean(dim=-1, keepdim=True)
    maps = maps - mean
    deviation = maps.square().mean(dim=-1, keepdim=True).sqrt()
    constant = deviation <= 1e-6 * mean.abs()  # up to the rounding of float32
    return torch.where(constant, 0.0, maps / deviation.clamp(min=1e-30))


def _places(scores: Tensor) -> Tensor:
    """The rank of each score, 0 for the highest."""
    return scores.argsort(descending=True, stable=True).argsort()


def _on_grid(maps: Tensor, grid: Sequence[int]) -> Tensor:
    """``[G, h, w]`` or ``[G, f, h, w]``, interpolated to the grid."""
    if maps.shape[1:] == tuple(grid):
        return maps
    return F.interpolate(maps[None], tuple(grid), mode="trilinear" if len(grid) == 3 else "bilinear")[0]
