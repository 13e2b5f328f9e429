"""Group-relative advantages (Flow-GRPO, arXiv 2505.05470, after GRPO)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-4


class Advantages(NamedTuple):
    """float32 ``[N]`` or ``[N, columns]``, and how many groups say nothing because all their rewards are equal."""

    values: Tensor
    flat_groups: int


def group_advantages(rewards: Tensor, group_size: int, *, std: Literal["group", "global"] = "group") -> Advantages:
    """``(reward - mean of its group) / (standard deviation + 1e-4)``.

    Args:
        rewards: ``[N]``, group after group; NaN marks a sample without a reward. It counts in no mean and no deviation,
            and its advantage is zero.
        group_size: samples of a group; divides N.
        std: the deviation of the group or, as Flow-GRPO's option, of all rewards; both over N, not N - 1.

    Raises:
        ValueError: rewards of another shape.
    """
    if rewards.ndim != 1 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"rewards must be [N], N a multiple of group_size {group_size}, got {list(rewards.shape)}")
    offset, deviation = _compared(rewards, group_size, std)
    return Advantages((offset / (deviation + EPSILON)).flatten().float(), _flat(offset))


def phrase_advantages(rewards: Tensor, group_size: int, *, std: Literal["group", "global"] = "group") -> Advantages:
    """:func:`group_advantages` of each column of ``[N, G]``, the rewards of phrases; NaN where a prompt has fewer.

    A group says nothing where that holds for each of its phrases.
    """
    values = torch.stack([group_advantages(own, group_size, std=std).values for own in rewards.unbind(1)], dim=1)
    return Advantages(values, _flat(values.view(-1, group_size * values.shape[1])))


def split_advantages(
    rewards: Tensor, phrases: Tensor, group_size: int, *, std: Literal["group", "global"] = "group"
) -> Advantages:
    """:func:`group_advantages` of ``[N]``, and beside it the part of each phrase, ``[N, 1 + G]``.

    The part is ``(phrase - mean of its group) / (standard deviation of the rewards + 1e-4)``: where phrases sum to the
    rewards, parts sum to advantages. In a group of equal rewards all parts are zero.

    Args:
        rewards: of samples, as for :func:`group_advantages`.
        phrases: each phrase's part of its sample's reward ``[N, G]``; NaN where a prompt has fewer.
    """
    whole, deviation = _compared(rewards, group_size, std)
    flat = (whole == 0).all(dim=1, keepdim=True)
    parts = [torch.where(flat, 0.0, _compared(own, group_size, std)[0]) for own in phrases.unbind(1)]
    columns = [(offset / (deviation + EPSILON)).flatten().float() for offset in (whole, *parts)]
    return Advantages(torch.stack(columns, dim=1), int(flat.sum()))


def _compared(rewards: Tensor, group_size: int, std: Literal["group", "global"]) -> tuple[Tensor, Tensor]:
    """Rewards ``[groups, group_size]`` less the mean of their group, and the deviation that they are measured in."""
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


def _flat(values: Tensor) -> int:
    return int((values == 0).all(dim=1).sum())
