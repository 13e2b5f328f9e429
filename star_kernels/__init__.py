"""Fused attention maps and spatially weighted policy losses for RL post-training of text-to-image flow models."""

from star_kernels.allocation import allocate, total_variation
from star_kernels.attention import AttentionOutput, AttentionStatistics, attention, attention_maps
from star_kernels.policy import (
    PolicyLoss,
    Transition,
    dance_sde,
    flow_cps,
    flow_matching,
    flow_sde,
    sample_transition,
    weighted_nft_loss,
    weighted_policy_loss,
)
from star_kernels.selection import TokenSelection

__all__ = [
    "AttentionOutput",
    "AttentionStatistics",
    "PolicyLoss",
    "TokenSelection",
    "Transition",
    "allocate",
    "attention",
    "attention_maps",
    "dance_sde",
    "flow_cps",
    "flow_matching",
    "flow_sde",
    "sample_transition",
    "total_variation",
    "weighted_nft_loss",
    "weighted_policy_loss",
]
