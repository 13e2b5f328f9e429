"""Exact attention that also returns token-aggregated attention maps, and maps computed from a log-sum-exp."""

from star_kernels.attention.functional import AttentionOutput, AttentionStatistics, attention, attention_maps

__all__ = ["AttentionOutput", "AttentionStatistics", "attention", "attention_maps"]
