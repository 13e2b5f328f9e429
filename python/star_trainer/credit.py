"""Credit by phrase: the phrases of a prompt, who can score them, and what the advantage of each counts for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from star_kernels import TokenSelection
from star_kernels.prompts import Core, core_content
from star_trainer.advantages import Advantages, group_advantages, phrase_advantages, split_advantages
from star_trainer.config import Allocation, Config
from star_trainer.prompts import Prompt
from star_trainer.rewards.base import PhraseReward, Scores
from star_trainer.rewards.weighted import WeightedSum


def cores_of(prompts: Sequence[Prompt], allocation: Allocation) -> list[Core]:
    """The core content of each prompt; its phrases are what maps are of, and what a reward scores."""
    found = {p: core_content(p.text, allocation.source, metadata=p.metadata) for p in dict.fromkeys(prompts)}
    return [found[prompt] for prompt in prompts]


def phrase_shares(selection: TokenSelection, allocation: Allocation) -> Tensor:
    """float32 ``[B, G]``: what the advantages of phrases count for, 0 for those that have no tokens and so no map.

    One over the number of the prompt's phrases, for their mean; one where the picture's advantage is split.
    """
    there = selection.weight.sum(dim=2) > 0
    return there.float() if allocation.credit == "split" else there / there.sum(dim=1, keepdim=True).clamp(min=1)


def advantages_of(rewards: Scores, config: Config) -> Advantages:
    """Of all samples of an epoch, ``[N]`` or as :func:`acting` takes them."""
    size, std = config.rollout.group_size, config.reward.std
    if rewards.phrases is None:
        return group_advantages(rewards.total, size, std=std)
    if config.allocation.credit == "phrase":
        return phrase_advantages(rewards.phrases, size, std=std)
    return split_advantages(rewards.total, rewards.phrases, size, std=std)


def acting(advantages: Tensor, shares: Tensor, allocation: Allocation, limit: float) -> Tensor:
    """The advantages that act by each group's weights.

    Args:
        advantages: of phrases ``[B, columns]``; to be split, those of pictures first and then each phrase's part.
        shares: :func:`phrase_shares` ``[B, G]``; prompts of other batches may have more phrases, or fewer.
        limit: phrases' own advantages are clipped to plus and minus this.

    Returns:
        ``[B, G]``; where the picture's advantage is split ``[B, 1 + G]``, first what is no phrase's.
    """
    groups = shares.shape[1]
    if allocation.credit == "phrase":
        return advantages[:, :groups].clamp(-limit, limit) * shares
    parts = advantages[:, 1 : 1 + groups] * shares
    return torch.cat([advantages[:, :1] - parts.sum(dim=1, keepdim=True), parts], dim=1)


def check_rewards(rewards: WeightedSum, allocation: Allocation) -> None:
    """Raises ValueError where a reward cannot give the credit that the settings ask for."""
    if allocation.credit == "image":
        return
    scoring = [name for name, reward in rewards.rewards.items() if isinstance(reward, PhraseReward)]
    counted = [name for name, weight in rewards.weights.items() if weight]
    if not set(counted) <= set(scoring):
        without = ", ".join(repr(name) for name in counted if name not in scoring)
        raise ValueError(
            f"allocation.credit must be 'image' unless all of reward.weights score phrases (by_phrase, as 'scene'), "
            f"got {allocation.credit!r} with {without}"
        )
