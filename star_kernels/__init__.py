"""Fused attention maps and spatially weighted policy losses for RL post-training of text-to-image flow models."""

from star_kernels.attention import AttentionOutput, attention, attention_maps
from star_kernels.selection import TokenSelection

__all__ = ["AttentionOutput", "TokenSelection", "attention", "attention_maps"]
