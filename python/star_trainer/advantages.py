"""Group-relative advantages (Flow-GRPO, arXiv 2505.05470, after GRPO)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-4


class Advantages(NamedTuple):
    """float32 ``[N]``, and how many groups say nothing because all their rewards are equal."""

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
    grouped = rewards.double().view(-1, group_size)
    known = grouped.isfinite()
    values = torch.where(known, grouped, 0.0)
    count = known.sum(dim=1, keepdim=True).clamp(min=1)
    mean = values.sum(dim=1, keepdim=True) / count
    offset = torch.where(known, grouped - mean, 0.0)
    deviation = (offset.square().sum(dim=1, keepdim=True) / count).sqrt()
    flat = int((deviation == 0).sum())
    if std == "global":
        whole = values[known]
        deviation = whole.std(correction=0) if len(whole) else torch.ones(())
    return Advantages((offset / (deviation + EPSILON)).flatten().float(), flat)
