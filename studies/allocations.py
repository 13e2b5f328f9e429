"""The allocations that the studies compare: STAR, its options and its controls, from the maps of one rollout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels import TokenSelection, allocate, total_variation
from star_kernels.capture import attach_maps
from star_kernels.prompts import regions_of, select_tokens
from star_trainer.config import Config
from star_trainer.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.rollout import roll_out as plain_roll_out
from star_trainer.samples import Batch
from star_trainer.scenes.describe import COLORS
from star_trainer.scenes.detect import color_masks

# For each allocation the terms of its loss: advantages [N] and their weights [N, Steps, P].
Fields = dict[str, list[tuple[Tensor, Tensor]]]
CONTROLS = (
    "shuffled",
    "inverted",
    "all tokens",
    "frozen",
    "another rollout's",
    "permuted advantages",
    "split, shuffled",
    "split, inverted",
    "means of one, shuffled",
    "means of one, inverted",
)
OPTIONS = (
    "core, preset blocks",
    "trajectory",
    "cap 2",
    "squared",
    "split",
    "means of one",
    "means of one, preset blocks",
    "means of one, rest by core",
    "phrases",
    "phrases alone",
    "phrases without maps",
    "steps by contrast",
    "steps by change",
    "core, by change",
    "steps by noise",
)
STRENGTHS = (0.25, 0.5, 0.75)
ORACLES = ("object mask (oracle)", "parts on own objects (oracle)", "parts off other objects (oracle)")


@dataclass(frozen=True)
class Rollout:
    """A batch, and the attention maps of its trained steps, averaged over heads.

    Attributes:
        phrases: ``[N, Steps, Blocks, G, P]``, the maps of each phrase; zero for phrases that a prompt does not have.
        everything: ``[N, Steps, Blocks, P]``, the maps of all text tokens.
        following: ``[N, Steps, Blocks, P]``, the maps of all phrases in the next step (in the last step, its own maps).
        noise: ``[Steps]``, the standard deviation of each transition.
    """

    batch: Batch
    phrases: Tensor
    everything: Tensor
    following: Tensor
    noise: Tensor
    group_size: int


def names(blocks: int) -> Iterator[str]:
    """The names of all allocations, in the order of the tables."""
    yield "scalar"
    yield "core"
    yield from (f"strength {strength:g}" for strength in STRENGTHS)
    yield from OPTIONS
    yield from (f"block {n}" for n in range(blocks))
    yield from ORACLES
    yield from CONTROLS


def split_names(text: str) -> list[str]:
    """Splits the names of a command line at semicolons; some names contain commas."""
    return [name.strip() for name in text.split(";")]


def check_arms(arms: Sequence[str], known: Sequence[str]) -> None:
    """Exits with an error if an arm is not known."""
    for name in arms:
        if name not in known:
            raise SystemExit(f"--arms must be names from {'; '.join(known)}, got {name!r}")


def color(name: str) -> str:
    """The color of an allocation in plots."""
    if name == "scalar":
        return "#7F7F7F"
    if name in CONTROLS:
        return "#E69F00"
    return "#009E73" if "oracle" in name else "#0072B2"


def roll_out(policy: Policy, prompts: Sequence[Prompt], config: Config, epoch: int, autocast: Any) -> Rollout:
    """Rolls out all samples of an epoch in one batch, with the maps of every block and phrase."""
    size = config.rollout.group_size
    each = [prompt for prompt in prompts for _ in range(size)]
    blocks = range(len(policy.model.transformer_blocks))
    selection = _selection(policy, each)
    steps: list[Tensor] = []
    with ExitStack() as stack:
        cfg = "last" if config.rollout.guidance > 1 else None
        handles = [attach_maps(policy.model, selection, blocks=[b], cfg=cfg) for b in blocks]
        for handle in handles:
            stack.callback(handle.remove)
        stack.callback(policy.model.register_forward_hook(lambda *_: steps.append(_taken(handles))).remove)
        plain = replace(config, allocation=replace(config.allocation, method="plain"))
        batch = plain_roll_out(policy, each, range(len(each)), plain, epoch, autocast)
    numbers, schedule = [step.number for step in batch.steps], policy.schedule(config.rollout.steps)
    maps = torch.stack([steps[n] for n in numbers], dim=1)  # [N, Steps, Blocks, G + 1, P]
    following = torch.stack([steps[min(n + 1, len(steps) - 1)] for n in numbers], dim=1)[:, :, :, :-1].sum(dim=3)
    noise = torch.cat([schedule.transition(n, config, 1, torch.device("cpu")).std for n in numbers])
    return Rollout(batch, maps[:, :, :, :-1], maps[:, :, :, -1], following, noise, size)


def fields(rollout: Rollout, credit: tuple[Tensor, Tensor, Tensor], seed: int, preset_blocks: Sequence[int]) -> Fields:
    """The terms of the loss of every allocation. Unless the name says otherwise, maps are averaged over all blocks.

    Args:
        credit: the advantages of samples ``[N]`` and of phrases ``[N, G]``, and the contributions of the phrases to the
            advantages of the samples ``[N, G]``.
        seed: the seed of the controls' random choices.
        preset_blocks: the blocks that star-train uses with its preset.
    """
    advantages, by_phrase, parts = credit
    generator = torch.Generator().manual_seed(seed)
    core = rollout.phrases.sum(dim=3)  # [N, Steps, Blocks, P]
    mean, preset = core.mean(dim=2), core[:, :, preset_blocks].mean(dim=2)
    weights = allocate(mean, layout="bsp")
    ones = torch.ones_like(weights)
    change = total_variation(preset, rollout.following[:, :, preset_blocks].mean(dim=2), layout="bsp")
    moved = shuffled(weights, generator)
    other = torch.arange(len(mean)).view(-1, rollout.group_size).roll(1, dims=1).flatten()
    maps = rollout.phrases.mean(dim=2)  # [N, Steps, G, P]
    by_own_map = _phrases(maps, by_phrase)
    of_phrases = _phrases(maps, parts, mean=False)
    rest = [(advantages - torch.stack([part for part, _ in of_phrases]).sum(dim=0), ones)]
    found_words = rollout.phrases[:, :, preset_blocks].mean(dim=2)  # [N, Steps, G, P]
    split = _by_shares(found_words, allocate(preset, layout="bsp"), advantages, parts)
    of_preset = _phrases(found_words, parts, mean=False)
    mask = object_mask(rollout.batch)
    own = phrase_masks(rollout.batch)[:, None].expand(-1, weights.shape[1], -1, -1)  # [N, Steps, G, P]
    seen = own.sum(dim=(1, 3)) > 0
    found: Fields = {
        "scalar": [(advantages, ones)],
        "core": [(advantages, weights)],
        "core, preset blocks": [(advantages, allocate(preset, layout="bsp"))],
        "trajectory": [(advantages, allocate(mean, layout="bsp", over="trajectory"))],
        "cap 2": [(advantages, allocate(mean, layout="bsp", cap=2.0))],
        "squared": [(advantages, allocate(mean.square(), layout="bsp"))],
        "split": split,
        "means of one": [*rest, *of_phrases],
        "means of one, preset blocks": [*rest, *of_preset],
        "means of one, rest by core": [(rest[0][0], allocate(preset, layout="bsp")), *of_preset],
        "phrases": _phrases(maps, (advantages[:, None] + by_phrase) / 2),
        "phrases alone": by_own_map,
        "phrases without maps": [(own, ones) for own, _ in by_own_map],
        "steps by contrast": [(advantages, _over_steps(_contrast(preset), ones))],
        "steps by change": [(advantages, _over_steps(change, ones))],
        "core, by change": [(advantages, allocate(preset, layout="bsp", over="trajectory", step_signal=change))],
        "steps by noise": [(advantages, _over_steps(rollout.noise.expand(len(ones), -1), ones))],
        **{f"block {b}": [(advantages, allocate(core[:, :, b], layout="bsp"))] for b in range(core.shape[2])},
        "object mask (oracle)": [(advantages, allocate(mask[:, None].expand_as(mean), layout="bsp"))],
        "parts on own objects (oracle)": _by_parts(ones, own, seen, advantages, parts),
        "parts off other objects (oracle)": _by_parts(ones, 1 - mask[:, None, None] + own, seen, advantages, parts),
        "shuffled": [(advantages, moved)],
        "inverted": [(advantages, _inverted(mean))],
        "all tokens": [(advantages, allocate(rollout.everything.mean(dim=2), layout="bsp"))],
        "frozen": [(advantages, allocate(mean.mean(dim=1, keepdim=True).expand_as(mean), layout="bsp"))],
        "another rollout's": [(advantages, weights[other])],
        "permuted advantages": [(_permuted(advantages, rollout.group_size, generator), weights)],
        "split, shuffled": [(part, shuffled(own, torch.Generator().manual_seed(seed))) for part, own in split],
        "split, inverted": _by_shares(found_words, _inverted(preset), advantages, parts),
        "means of one, shuffled": [*rest, *((part, shuffled(own, generator)) for part, own in of_phrases)],
        "means of one, inverted": [
            *rest,
            *((part, _inverted(own)) for part, own in of_phrases),
        ],
    }
    return found


def shuffled(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Weights ``[N, Steps, P]`` moved to random positions, with the same permutation in all steps of a sample."""
    order = torch.rand(weights.shape[0], weights.shape[2], generator=generator).argsort(dim=1).to(weights.device)
    return weights.gather(2, order[:, None].expand_as(weights))


def object_mask(batch: Batch) -> Tensor:
    """The fraction of each patch of the finished image that has a color named in the prompt, ``[N, P]``.

    Printed words may have any color, so for them every color counts.
    """
    covered = _covered(batch)
    wanted = torch.zeros(covered.shape[:2])
    for row, prompt in zip(wanted, batch.prompts, strict=True):
        for entry in prompt.metadata.get("include", ()):
            row[COLORS.index(entry["color"])] = 1
        if "text" in prompt.metadata:
            row[:] = 1
    return (covered * wanted[:, :, None]).sum(dim=1)


def phrase_masks(batch: Batch) -> Tensor:
    """The mask of each phrase that the reward scores, ``[N, G, P]``; zero for phrases that a prompt does not have."""
    covered = _covered(batch)
    found = [
        covered[n].sum(dim=0, keepdim=True)
        if "text" in prompt.metadata
        else covered[n, [COLORS.index(entry["color"]) for entry in prompt.metadata["include"]]]
        for n, prompt in enumerate(batch.prompts)
    ]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)


def _covered(batch: Batch) -> Tensor:
    """The fraction of each patch of the finished image that each color covers, ``[N, Colors, P]``."""
    side = batch.steps[0].sample.shape[-1] // 2
    return F.adaptive_avg_pool2d(color_masks(batch.images), side).flatten(2)


def _phrases(maps: Tensor, by_phrase: Tensor, *, mean: bool = True) -> list[tuple[Tensor, Tensor]]:
    """Terms with the advantage of each phrase ``[N, G]``, weighted by its own map of ``[N, Steps, G, P]``.

    The terms add up to the mean over the phrases of a prompt, or to their sum if ``mean`` is False.
    """
    present = maps.sum(dim=(1, 3)) > 0  # [N, G]
    share = present / present.sum(dim=1, keepdim=True).clamp(min=1) if mean else present.float()
    count = min(maps.shape[2], by_phrase.shape[1])
    return [
        ((by_phrase * share[:, : by_phrase.shape[1]])[:, g], allocate(maps[:, :, g], layout="bsp"))
        for g in range(count)
    ]


def _by_shares(maps: Tensor, weights: Tensor, advantages: Tensor, parts: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The "split" credit of star-train: the weights of all phrases, divided by each phrase's share of the attention."""
    total = maps.sum(dim=2, keepdim=True)
    shares = torch.where(total > 0, maps / total, 1.0)
    return _by_parts(weights, weights[:, :, None] * shares, maps.sum(dim=(1, 3)) > 0, advantages, parts)


def _by_parts(
    weights: Tensor, of_parts: Tensor, present: Tensor, advantages: Tensor, parts: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Terms with the contribution of each phrase to the advantage, and one with the remainder of the advantage.

    Args:
        weights: ``[N, Steps, P]``, the weights of the remainder.
        of_parts: ``[N, Steps, G, P]``, the weights of each phrase.
        present: ``[N, G]``, false for phrases whose contribution is added to the remainder.
        advantages: ``[N]``.
        parts: ``[N, G]``, the contributions of the phrases to the advantages.
    """
    count = min(of_parts.shape[2], parts.shape[1])
    acting = parts[:, :count] * present[:, :count]
    return [(advantages - acting.sum(dim=1), weights), *((acting[:, g], of_parts[:, :, g]) for g in range(count))]


def _over_steps(signal: Tensor, ones: Tensor) -> Tensor:
    """Weights ``[N, Steps, P]`` with mean one that are proportional to a signal ``[N, Steps]`` of each step."""
    return allocate(ones, layout="bsp", over="trajectory", step_signal=signal)


def _contrast(maps: Tensor) -> Tensor:
    """The KL divergence of each map from the uniform map, ``[N, Steps]``."""
    share = maps / maps.sum(dim=2, keepdim=True).clamp(min=1e-12)
    return (math.log(maps.shape[2]) - torch.special.entr(share).sum(dim=2)).clamp(min=0)


def _inverted(maps: Tensor) -> Tensor:
    """Weights that are high where the maps are low."""
    return allocate(maps.amax(dim=2, keepdim=True) - maps, layout="bsp")


def _permuted(advantages: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Advantages permuted within each group."""
    grouped = advantages.view(-1, size)
    return grouped.gather(1, torch.rand(grouped.shape, generator=generator).argsort(dim=1)).flatten()


def _selection(policy: Policy, prompts: Sequence[Prompt]) -> TokenSelection:
    """A selection with each phrase of the prompts, and all text tokens as the last phrase."""
    regions = regions_of(policy.pipeline, max_sequence_length=policy.text_length)
    found, _ = select_tokens(
        [p.text for p in prompts],
        regions,
        metadata=[p.metadata for p in prompts],
        per_phrase=True,
    )
    length = policy.encode([prompts[0].text]).tokens.shape[1]
    mask = torch.zeros(found.batch, found.phrases + 1, length)
    index = found.index.clamp(min=0).long()[:, None].expand(-1, found.phrases, -1)
    mask[:, :-1].scatter_add_(2, index, found.weight)
    mask[:, -1] = 1
    return TokenSelection.from_mask(mask)


def _taken(handles: Sequence[Any]) -> Tensor:
    """Takes the maps of a forward pass, ``[N, Blocks, G, P]``."""
    return torch.stack([handle.take().flatten(2).cpu() for handle in handles], dim=1)
