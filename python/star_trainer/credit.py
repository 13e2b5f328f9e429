"""Credit assignment: where, when and by how much the advantage of a sample acts.

All decisions about credit are made in this file. In the order of an epoch:

1. tokens: which words of the prompt have a map (:func:`select`), and how many phrases rewards score
   (:func:`phrase_counts`);
2. maps: which steps and blocks are captured during a rollout (:class:`RolloutMaps`, :func:`capture`);
3. weights: how maps become weights of the trained steps (:func:`weighted`);
4. advantages: how rewards become advantages of samples and of phrases (:func:`advantages_of`);
5. combination: which advantage each weight map is multiplied by (:func:`advantages_per_map`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from star_kernels import TokenSelection, allocate, total_variation
from star_kernels.capture import attach_maps
from star_kernels.prompts import regions_of, select_tokens
from star_trainer.config import Allocation, Config
from star_trainer.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.rewards.base import PhraseReward, Scores
from star_trainer.rewards.weighted import WeightedSum
from star_trainer.samples import Step

EPSILON = 1e-4  # added to the standard deviation of rewards, as in Flow-GRPO


def select(policy: Policy, prompts: Sequence[Prompt], allocation: Allocation) -> TokenSelection:
    """The tokens of each prompt's core content; with credit by phrase, one map for each phrase."""
    regions = regions_of(policy.pipeline, max_sequence_length=policy.text_length)
    cores = [prompt.core for prompt in prompts]
    selection, names = select_tokens(cores, regions, per_phrase=allocation.credit != "image")
    if allocation.credit != "image":
        # If truncation removes all phrases of a prompt, select_tokens selects all of its words: the map of no phrase.
        own = torch.tensor([found == core.names for found, core in zip(names, cores, strict=True)])
        selection = replace(selection, weight=selection.weight * own[:, None, None])
    return selection.to(policy.device)


def phrase_counts(prompts: Sequence[Prompt], allocation: Allocation) -> list[int] | None:
    """The number of phrases of each prompt that rewards must score; None with credit by image."""
    return None if allocation.credit == "image" else [len(prompt.core.phrases) for prompt in prompts]


def phrase_shares(selection: TokenSelection, allocation: Allocation) -> Tensor:
    """The factor of each phrase's advantage, float32 ``[B, G]``; 0 for phrases without tokens, which have no map.

    With credit "phrase" it is one over the number of the prompt's phrases, so that the loss is their mean; with "split"
    it is one.
    """
    present = selection.weight.sum(dim=2) > 0
    return present.float() if allocation.credit == "split" else present / present.sum(dim=1, keepdim=True).clamp(min=1)


def capture(policy: Policy, selection: TokenSelection | None, config: Config) -> Any:
    """A handle that captures the maps of ``allocation.blocks``; under guidance, those of the conditional half.

    Raises:
        ValueError: the model does not have these blocks.
    """
    return attach_maps(
        policy.transformer,
        selection,
        blocks=config.allocation.blocks,
        cfg="last" if policy.base.doubled else None,
    )


class RolloutMaps:
    """A context that captures the maps that the allocation needs during a rollout; none with ``method: plain``.

    Args:
        prompts: prompt of each sample.
        trained: indices of the trained steps.
        shown: indices of further steps, whose weights are drawn in figures; for ``over`` "step", which gives each step
            weights of its own.

    Attributes:
        shares: :func:`phrase_shares` with credit by phrase; else None.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        trained: Sequence[int],
        config: Config,
        shown: Sequence[int] = (),
    ) -> None:
        allocation = config.allocation
        self.shares: Tensor | None = None
        self._policy, self._config, self._trained, self._shown = policy, config, trained, shown
        # The total variation of a step compares its map with that of the next step.
        self._following = [step + 1 for step in trained] if allocation.over == "total_variation" else []
        self._selection: TokenSelection | None = None
        self._handle: Any = None
        self._maps: dict[int, Tensor] = {}  # by step
        if allocation.method == "star":
            self._selection = select(policy, prompts, allocation)
            if allocation.credit != "image":
                self.shares = phrase_shares(self._selection, allocation)

    def __enter__(self) -> RolloutMaps:
        if self._selection is not None:
            self._handle = capture(self._policy, self._selection, self._config)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """The forward pass of a step, whose maps are captured if the allocation needs them."""
        needed = self._handle is not None and step in {*self._trained, *self._following, *self._shown}
        if self._handle is not None:
            self._handle.enabled = needed
        yield
        if needed:
            maps = self._handle.take()
            self._maps[step] = maps[:, 0] if self.shares is None else maps

    def weigh(self, steps: list[Step]) -> list[Step]:
        """The trained steps with the weights of their maps."""
        if not self._maps:
            return steps
        own, following = ([self._maps[step] for step in chosen] for chosen in (self._trained, self._following))
        after = torch.stack(following, dim=1) if following else None
        weights = weights_of(torch.stack(own, dim=1), self._config.allocation, after)
        return [replace(step, weights=weights[:, i].contiguous()) for i, step in enumerate(steps)]

    def weigh_shown(self) -> dict[int, Tensor]:
        """The weights of each shown step by its map."""
        allocation = self._config.allocation
        return {step: weights_of(self._maps[step][:, None], allocation)[:, 0] for step in self._shown if self._maps}


def weights_of(maps: Tensor, allocation: Allocation, following: Tensor | None = None) -> Tensor:
    """The weights of steps from their maps, of the same shape; with credit "split" ``[B, Steps, 1 + G, h, w]``.

    With credit "split", the first weight map comes from the sum of all phrases' maps; it multiplies the part of the
    advantage that belongs to no phrase. The weight map of a phrase is the first one times the phrase's share of the
    attention at each position.

    Args:
        maps: ``[B, Steps, rows, columns]``; with credit by phrase ``[B, Steps, G, rows, columns]``.
        following: the maps of the step after each, of the same shape; required for ``over`` "total_variation".
    """
    splits = allocation.credit == "split"
    found = maps.sum(dim=2) if splits else maps
    layout = "bshw" if found.ndim == 4 else "bsghw"
    signal = None
    if following is not None:
        signal = total_variation(found, following.sum(dim=2) if splits else following, layout=layout)
    weights = allocate(
        found,
        layout=layout,
        strength=allocation.strength,
        over="trajectory" if allocation.over == "total_variation" else allocation.over,
        cap=allocation.cap,
        step_signal=signal,
    )
    if splits:
        total = found[:, :, None]
        shares = torch.where((total > 0) & total.isfinite(), maps / total, 1.0)
        each = weights[:, :, None] * torch.lerp(torch.ones_like(shares), shares, allocation.strength)
        weights = torch.cat([weights[:, :, None], each], dim=2)
    return weights


def overall_weights(weights: Tensor, shares: Tensor | None, allocation: Allocation) -> Tensor:
    """The weights ``[Steps, rows, columns]`` of all phrases of one sample together, for figures.

    Args:
        weights: of the sample, ``[Steps, rows, columns]`` or, with credit by phrase, ``[Steps, G, rows, columns]``.
        shares: :func:`phrase_shares` of the sample ``[G]``; None with credit by image.
    """
    if shares is None:
        return weights
    return weights[:, 0] if allocation.credit == "split" else torch.einsum("tghw, g -> thw", weights, shares)


class Advantages(NamedTuple):
    """Group-relative advantages (Flow-GRPO, arXiv 2505.05470, after GRPO).

    Attributes:
        values: float32 ``[N]`` or ``[N, columns]``.
        flat_groups: number of groups without a learning signal, because all their rewards are equal.
    """

    values: Tensor
    flat_groups: int


def advantages_of(rewards: Scores, config: Config, weights: Mapping[str, float] | None = None) -> Advantages:
    """The advantages of all samples of an epoch, in the columns that :func:`advantages_per_map` expects.

    Args:
        weights: weight of each part of the rewards, required with ``reward.combine`` "apart".
    """
    size, std = config.rollout.group_size, config.reward.std
    if config.reward.combine == "apart":
        if weights is None:
            raise ValueError("weights must be given with reward.combine 'apart', got None")
        return apart_advantages(rewards, weights, size, std=std)
    if rewards.phrases is None:
        return group_advantages(rewards.total, size, std=std)
    if config.allocation.credit == "phrase":
        return phrase_advantages(rewards.phrases, size, std=std)
    return split_advantages(rewards.total, rewards.phrases, size, std=std)


def group_advantages(rewards: Tensor, group_size: int, *, std: Literal["group", "global"] = "group") -> Advantages:
    """``(reward - mean of its group) / (standard deviation + 1e-4)``.

    Args:
        rewards: ``[N]``, group after group; NaN marks a sample without a reward. Such a sample is left out of means and
            deviations, and its advantage is zero.
        group_size: samples of a group; divides N.
        std: standard deviation of the group or, as Flow-GRPO's option, of all rewards; both divide by N, not N - 1.

    Raises:
        ValueError: rewards of another shape.
    """
    if rewards.ndim != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"rewards must be [N], N a multiple of group_size {group_size}, got {list(rewards.shape)}")
    offset, deviation = _centred(rewards, group_size, std)
    return Advantages((offset / (deviation + EPSILON)).flatten().float(), _flat_groups(offset))


def apart_advantages(
    rewards: Scores, weights: Mapping[str, float], group_size: int, *, std: Literal["group", "global"] = "group"
) -> Advantages:
    """The weighted sum of the :func:`group_advantages` of each reward, over its standard deviation in the epoch.

    This is GDPO (arXiv 2601.05242): a reward whose values lie close together counts as much as one with a wide range.
    A sample without one of the rewards has the advantage zero, and is left out of all means and deviations.
    """
    known = rewards.total.isfinite()
    counted = {name: weight for name, weight in weights.items() if weight}
    apart = [rewards.parts[name].where(known, torch.nan) for name in counted]
    values = sum(
        (w * group_advantages(own, group_size, std=std).values for w, own in zip(counted.values(), apart, strict=True)),
        torch.zeros(len(known)),
    )
    deviation = values[known].std(correction=0) if known.any() else torch.ones(())
    return Advantages(values / (deviation + EPSILON), _flat_groups(values.view(-1, group_size)))


def phrase_advantages(rewards: Tensor, group_size: int, *, std: Literal["group", "global"] = "group") -> Advantages:
    """:func:`group_advantages` of each column of ``[N, G]``, the rewards of phrases; NaN if a prompt has fewer.

    A group is flat if it is flat in every column.
    """
    values = torch.stack([group_advantages(own, group_size, std=std).values for own in rewards.unbind(1)], dim=1)
    return Advantages(values, _flat_groups(values.view(-1, group_size * values.shape[1])))


def split_advantages(
    rewards: Tensor, phrases: Tensor, group_size: int, *, std: Literal["group", "global"] = "group"
) -> Advantages:
    """:func:`group_advantages` of ``[N]``, followed by the part of each phrase: ``[N, 1 + G]``.

    The part of a phrase is ``(phrase - mean of its group) / (standard deviation of the rewards + 1e-4)``: if phrases
    sum to the rewards, parts sum to the advantages. In a group of equal rewards all parts are zero.

    Args:
        rewards: rewards of the samples, as for :func:`group_advantages`.
        phrases: each phrase's part of its sample's reward ``[N, G]``; NaN if a prompt has fewer.
    """
    whole, deviation = _centred(rewards, group_size, std)
    flat = (whole == 0).all(dim=1, keepdim=True)
    parts = [torch.where(flat, 0.0, _centred(own, group_size, std)[0]) for own in phrases.unbind(1)]
    columns = [(offset / (deviation + EPSILON)).flatten().float() for offset in (whole, *parts)]
    return Advantages(torch.stack(columns, dim=1), int(flat.sum()))


def advantages_per_map(advantages: Tensor, shares: Tensor | None, allocation: Allocation, limit: float) -> Tensor:
    """The advantages that the weight maps of a batch are multiplied by.

    Args:
        advantages: rows of :func:`advantages_of`: ``[B]`` with credit by image, ``[B, G']`` of phrases with credit
            "phrase", ``[B, 1 + G']`` of the image and of each phrase's part with credit "split". G' is the largest
            number of phrases in the epoch.
        shares: :func:`phrase_shares` of the batch ``[B, G]``; None with credit by image.
        limit: with credit "phrase", advantages are clipped to plus and minus this before they are multiplied by shares.

    Returns:
        ``[B]`` unchanged; ``[B, G]`` with credit "phrase"; ``[B, 1 + G]`` with credit "split", where the first column
        is what belongs to no phrase.
    """
    if shares is None:
        return advantages
    phrases = shares.shape[1]
    if allocation.credit == "phrase":
        return advantages[:, :phrases].clamp(-limit, limit) * shares
    parts = advantages[:, 1 : 1 + phrases] * shares
    return torch.cat([advantages[:, :1] - parts.sum(dim=1, keepdim=True), parts], dim=1)


def check_rewards(rewards: WeightedSum, allocation: Allocation) -> None:
    """Raises ValueError if a reward does not score phrases although ``allocation.credit`` requires it."""
    if allocation.credit == "image":
        return
    scoring = [name for name, reward in rewards.rewards.items() if isinstance(reward, PhraseReward)]
    counted = [name for name, weight in rewards.weights.items() if weight]
    if not set(counted) <= set(scoring):
        without = ", ".join(repr(name) for name in counted if name not in scoring)
        raise ValueError(
            f"allocation.credit must be 'image' unless all rewards in reward.weights score phrases (method by_phrase, "
            f"as in 'scene'), got {allocation.credit!r} with {without}"
        )


def _centred(rewards: Tensor, group_size: int, std: Literal["group", "global"]) -> tuple[Tensor, Tensor]:
    """Rewards ``[groups, group_size]`` minus the mean of their group, and the standard deviation to divide by."""
    grouped = rewards.double().view(-1, group_size)
    known = grouped.isfinite()
    values = torch.where(known, grouped, 0.0)
    count = known.sum(dim=1, keepdim=True).clamp(min=1)
    mean = values.sum(dim=1, keepdim=True) / count
    offset = torch.where(known, grouped - mean, 0.0)
    if std == "global":
        whole = values[known]
        return offset, whole.std(correction=0) if len(whole) else torch.ones(())
    return offset, (offset.square().sum(dim=1, keepdim=True) / count).sqrt()


def _flat_groups(values: Tensor) -> int:
    return int((values == 0).all(dim=1).sum())
