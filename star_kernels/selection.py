"""Which keys of the joint sequence a map aggregates, with which weight, and in which group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

from star_kernels.checks import check_dense

EMPTY = -1  # the index of an unused slot


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """Selected tokens of a batch of sequences, padded to a common number of slots.

    Args:
        index: int32 ``[B, T]``, token positions in the joint sequence; -1 marks an empty slot.
        weight: float32 ``[B, G, T]``, finite and not negative: the share of each token in each of G groups. A map is
            the sum over a group's tokens of weight times attention probability.

    Values are checked when the selection is built, which waits for the device if the tensors are on one; build it on
    the CPU and move it with :meth:`to` to avoid that.

    Raises:
        TypeError: a field is not a tensor of the stated dtype.
        ValueError: wrong shape or device, an index below -1, a negative or non-finite weight.
    """

    index: Tensor
    weight: Tensor
    last: int = field(init=False, repr=False)  # the largest position, known without asking the device

    def __post_init__(self) -> None:
        check_selection_fields(self.index, self.weight)
        last = EMPTY
        if not torch.compiler.is_compiling():  # a compiled graph has no values yet: there the kernels check positions
            _check_values(self.index, self.weight)
            last = int(self.index.max())
        object.__setattr__(self, "last", last)

    @property
    def batch(self) -> int:
        return self.index.shape[0]

    @property
    def tokens(self) -> int:
        """Slots per sequence, T."""
        return self.index.shape[1]

    @property
    def groups(self) -> int:
        """Groups per sequence, G."""
        return self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.index.device

    @classmethod
    def from_positions(
        cls, positions: Sequence[Sequence[int] | Sequence[Sequence[int]]], *, device: torch.device | str = "cpu"
    ) -> TokenSelection:
        """Selects listed positions, each with weight one, so that a map is the attention mass on them.

        Args:
            positions: for each sequence of the batch a list of token positions (one group), or a list of such lists
                (G groups, the same G for every sequence; a group may be empty).
            device: where the tensors are put.

        Example:
            ``TokenSelection.from_positions([[1029, 1030], [1101]])`` selects in one group,
            ``TokenSelection.from_positions([[[1029], [1030]], [[1101], []]])`` in two.
        """
        if not isinstance(positions, Sequence) or isinstance(positions, str) or not positions:
            raise ValueError(f"positions must be a non-empty list with one entry per sequence, got {positions!r}")
        grouped: list[list[Any]] = [[row] if _is_flat(row) else list(row) for row in positions]
        groups = len(grouped[0])
        for b, row in enumerate(grouped):
            if len(row) != groups:
                raise ValueError(
                    f"positions must give every sequence the same number of groups: positions[0] has {groups}, "
                    f"positions[{b}] has {len(row)}"
                )
            for group in row:
                if not _is_flat(group) or any(not 0 <= p < 2**31 for p in group):
                    raise ValueError(f"positions[{b}] must hold token positions of at least 0, got {group!r}")
        slots = max(1, max(sum(map(len, row)) for row in grouped))
        index = torch.full((len(grouped), slots), EMPTY, dtype=torch.int32)
        weight = torch.zeros(len(grouped), groups, slots)
        for b, row in enumerate(grouped):
            start = 0
            for g, group in enumerate(row):
                stop = start + len(group)
                index[b, start:stop] = torch.tensor(group, dtype=torch.int32)
                weight[b, g, start:stop] = 1.0
                start = stop
        return cls(index, weight).to(device)

    @classmethod
    def from_mask(cls, mask: Tensor) -> TokenSelection:
        """Selects the non-zero entries of a mask over the joint sequence; a float mask gives the weights.

        Args:
            mask: bool or float, ``[B, S]`` (one group) or ``[B, G, S]``.
        """
        if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool or floating-point tensor, got {got}")
        check_dense("mask", mask)
        if mask.ndim not in (2, 3) or 0 in mask.shape:
            raise ValueError(f"mask must have shape [B, S] or [B, G, S], none of them 0, got {list(mask.shape)}")
        weight = mask.float() if mask.ndim == 3 else mask.float()[:, None]  # [B, G, S]
        used = (weight != 0).any(dim=1)  # [B, S]
        slots = max(1, int(used.sum(dim=1).max()))
        order = torch.argsort(~used, dim=1, stable=True)[:, :slots]  # [B, T], used positions first, ascending
        index = torch.where(used.gather(1, order), order, EMPTY).to(torch.int32)
        return cls(index, weight.gather(2, order[:, None].expand(-1, weight.shape[1], -1)).contiguous())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenSelection:
        """The same selection on another device."""
        moved = object.__new__(TokenSelection)  # the values are known to be good: no check, no wait for the device
        object.__setattr__(moved, "index", self.index.to(device, non_blocking=non_blocking))
        object.__setattr__(moved, "weight", self.weight.to(device, non_blocking=non_blocking))
        object.__setattr__(moved, "last", self.last)
        return moved

    def shift(self, offset: int) -> TokenSelection:
        """Positions moved by ``offset``, for a text that starts at ``offset`` in the joint sequence."""
        used = self.index != EMPTY
        moved = self.index + offset
        if offset < 0 and bool((used & (moved < 0)).any()):
            raise ValueError(f"offset must leave every position at 0 or more, got {offset}")
        return TokenSelection(torch.where(used, moved, EMPTY), self.weight)


def _is_flat(row: object) -> TypeGuard[Sequence[int]]:
    return isinstance(row, Sequence) and all(isinstance(p, int) and not isinstance(p, bool) for p in row)


def check_selection_fields(index: Tensor, weight: Tensor) -> None:
    for name, value, dtype in (("index", index, torch.int32), ("weight", weight, torch.float32)):
        if not isinstance(value, Tensor) or value.dtype != dtype:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a {str(dtype).removeprefix('torch.')} tensor, got {got}")
        check_dense(name, value)
    if index.ndim != 2 or 0 in index.shape:
        raise ValueError(f"index must have shape [B, T] with B and T at least 1, got {list(index.shape)}")
    batch, slots = index.shape
    if weight.ndim != 3 or weight.shape[0] != batch or weight.shape[1] == 0 or weight.shape[2] != slots:
        raise ValueError(f"weight must have shape [B, G, T] = [{batch}, G, {slots}], got {list(weight.shape)}")
    if weight.device != index.device:
        raise ValueError(f"weight must be on the device of index, {index.device}, got {weight.device}")


def _check_values(index: Tensor, weight: Tensor) -> None:
    if int(index.min()) < EMPTY:
        raise ValueError(f"index must hold positions of at least 0, or -1 for an empty slot, got {int(index.min())}")
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        bad = weight[~((weight >= 0) & weight.isfinite())][0]
        raise ValueError(f"weight must be finite and not negative, got {float(bad)}")
