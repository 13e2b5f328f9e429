"""The arguments of a map in one value, from the public functions down to the kernels' launchers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The fields in the operators' schemas. Only the maps operators take text_to_image, as their last argument, and
# attn_mask, after the log-sum-exp.
SCHEMA = "Tensor index, Tensor weight, Tensor? key_mask, SymInt start, SymInt n_rows, float scale, bool reduce_heads"


class MapArguments(NamedTuple):
    """Which tokens a map aggregates, over which rows, and how; the fields are in the order of ``SCHEMA``."""

    index: Tensor  # type: ignore[assignment]  # int32 [B, T], positions of tokens, -1 in empty slots; not tuple.index
    weight: Tensor  # float32 [B, G, T]
    key_mask: Tensor | None  # bool [B, Sk], true for the keys that take part
    start: int  # the first row with a map
    n_rows: int
    scale: float  # factor of the scores
    reduce_heads: bool  # whether maps are averaged over heads
    text_to_image: bool = False  # whether the selected tokens are queries and the rows keys; else the reverse
    attn_mask: Tensor | None = None  # bool [B or 1, H or 1, Sq or 1, Sk], true for the pairs that take part

    @property
    def of_attention(self) -> tuple[Tensor, Tensor, Tensor | None, int, int, float, bool]:
        """The fields in ``SCHEMA``."""
        return self[:7]

    def shape(self, heads: int) -> tuple[int, ...]:
        """Shape of the maps: [B, G, R], or [B, G, H, R] without ``reduce_heads``."""
        batch, phrases, _ = self.weight.shape
        return (batch, phrases, self.n_rows) if self.reduce_heads else (batch, phrases, heads, self.n_rows)
