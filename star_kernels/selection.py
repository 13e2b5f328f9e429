"""Which keys of the joint sequence a map aggregates, with which weight, and in which group."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
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
        text: where the text stands in the joint sequence that the positions count in, as (start, length); the length
            is None where the positions hold for any. :func:`star_kernels.prompts.select_tokens` sets it, a capture
            refuses passes whose text stands elsewhere. None where it is not known.

    Values are checked when the selection is built, which waits for the device if the tensors are on one; build it on
    the CPU and move it with :meth:`to` to avoid that.

    Raises:
        TypeError: a field is not of the stated type.
        ValueError: wrong shape or device, an index below -1, a negative or non-finite weight.
    """

    index: Tensor
    weight: Tensor
    text: tuple[int, int | None] | None = None
    first: int = field(init=False, repr=False)  # the smallest and the largest position, or -1 where there is none,
    last: int = field(init=False, repr=False)  # known without a wait for the device

    def __post_init__(self) -> None:
        check_selection_fields(self.index, self.weight)
        _check_text(self.text)
        first = last = EMPTY
        if not torch.compiler.is_compiling():  # a compiled graph has no values yet: there the kernels check positions
            _check_values(self.index, self.weight)
            last = int(self.index.max())
            first = EMPTY if last == EMPTY else int(self.index.masked_fill(self.index == EMPTY, last).min())
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "last", last)

    @property
    def batch(self) -> int:
        return self.index.shape[0]

    @property
    def tokens(self) -> int:
        """Slots per sequence, T."""
        return self.index.shape[1]

    @property
    def phrases(self) -> int:
        """Phrases per sequence, G."""
        return self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.index.device

    @classmethod
    def from_positions(cls, positions: Iterable[Any], *, device: torch.device | str = "cpu") -> TokenSelection:
        """Selects listed positions, each with weight one, so that a map is the attention mass on them.

        Args:
            positions: for each sequence of the batch a list of token positions (one group), or a list of such lists
                (G groups, the same G for every sequence; a group may be empty). Tensors and arrays stand for lists,
                and whatever ``operator.index`` takes for an integer is one, True and False excepted.
            device: where the tensors are put.

        Raises:
            ValueError: anything else, a negative position, or groups that differ in number.

        Example:
            ``TokenSelection.from_positions([[1029, 1030], [1101]])`` selects in one group,
            ``TokenSelection.from_positions([[[1029], [1030]], [[1101], []]])`` in two.
        """
        rows = _lists(positions)
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"positions must be a non-empty list with one entry per sequence, got {positions!r}")
        for b, row in enumerate(rows):
            if not isinstance(row, list):
                raise ValueError(f"positions[{b}] must be a list of token positions or of such lists, got {row!r}")
        grouped: list[list[Any]] = [[row] if _is_flat(row) else row for row in rows]
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
        index = torch.full((len(grouped), slots), EMPTY, dtype=torch.int32, device="cpu")
        weight = torch.zeros(len(grouped), groups, slots, dtype=torch.float32, device="cpu")
        for b, row in enumerate(grouped):
            start = 0
            for g, group in enumerate(row):
                stop = start + len(group)
                index[b, start:stop] = torch.tensor(group, dtype=torch.int32, device="cpu")
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
        index, weight = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.index, self.weight))
        return _known_good(index, weight, self.text, self.first, self.last)

    def shift(self, offset: int) -> TokenSelection:
        """Positions moved by ``offset``, for a text that starts at ``offset`` in the joint sequence."""
        if self.last != EMPTY and self.first + offset < 0:
            raise ValueError(f"offset must leave every position at 0 or more, got {offset}")
        text = None if self.text is None or self.text[0] + offset < 0 else (self.text[0] + offset, self.text[1])
        first, last = (EMPTY if place == EMPTY else place + offset for place in (self.first, self.last))
        index = torch.where(self.index == EMPTY, EMPTY, self.index + offset)
        return _known_good(index, self.weight, text, first, last)

    def among_empty(self, before: int, after: int) -> TokenSelection:
        """The selection for a larger batch, whose ``before`` first and ``after`` last samples select nothing."""
        sides = ((self.index, EMPTY), (self.weight, 0.0))
        index, weight = (
            torch.cat([x.new_full((before, *x.shape[1:]), fill), x, x.new_full((after, *x.shape[1:]), fill)])
            for x, fill in sides
        )
        return _known_good(index, weight, self.text, self.first, self.last)


def _known_good(
    index: Tensor, weight: Tensor, text: tuple[int, int | None] | None, first: int, last: int
) -> TokenSelection:
    """A selection of values that were checked before: no check, no wait for the device."""
    made = object.__new__(TokenSelection)
    fields = {"index": index, "weight": weight, "text": text, "first": first, "last": last}
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _lists(value: Any) -> Any:
    """Lists and integers for what is one, nested ones included; anything else as it is."""
    if hasattr(value, "tolist"):  # a tensor, an array, or a scalar of one
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_lists(item) for item in value]
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def integers(value: object) -> list[int] | None:
    """A list, tensor or array of integers as a list; None for anything else."""
    found = _lists(value)
    return found if _is_flat(found) else None


def _is_flat(row: object) -> TypeGuard[list[int]]:
    return isinstance(row, list) and all(isinstance(p, int) and not isinstance(p, bool) for p in row)


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


def _check_text(text: object) -> None:
    if text is None:
        return
    pair = text if isinstance(text, tuple) and len(text) == 2 else (None, None)
    if (
        not isinstance(pair[0], int)
        or not isinstance(pair[1], int | None)
        or any(n is not None and n < 0 for n in pair)
    ):
        raise TypeError(f"text must be (start, length), integers of at least 0, the length or None, got {text!r}")


def _check_values(index: Tensor, weight: Tensor) -> None:
    if int(index.min()) < EMPTY:
        raise ValueError(f"index must hold positions of at least 0, or -1 for an empty slot, got {int(index.min())}")
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        bad = weight[~((weight >= 0) & weight.isfinite())][0]
        raise ValueError(f"weight must be finite and not negative, got {float(bad)}")
