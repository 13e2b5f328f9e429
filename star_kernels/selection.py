"""TokenSelection: the keys that a map aggregates, with their weight in each phrase."""

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
    """Selected tokens of a batch of sequences, padded to the same number of slots T.

    Args:
        index: int32 ``[B, T]``, token positions; -1 marks an empty slot. For :func:`star_kernels.attention` and
            :func:`star_kernels.attention_maps` they are positions of keys. For captures of models they are positions of
            the text, 0 is its first token: the capture adds where the text starts among the keys.
        weight: float32 ``[B, G, T]``, finite and non-negative: the weight of each token in each of G phrases. The map
            of a phrase is the sum over the slots of weight times attention probability.
        text_length: the length of the text for which the selection was made, if its positions depend on that length
            (text padded on the left). Set by :func:`star_kernels.prompts.select_tokens`; capturing a forward pass whose
            text has another length is then an error. None disables this check.

    Construction checks the values, which waits for the device if the tensors are on a GPU; to avoid that, build the
    selection on the CPU and move it with :meth:`to`.

    Raises:
        TypeError: a field is not of the stated type.
        ValueError: wrong shape or device, an index below -1, a negative or non-finite weight.
    """

    index: Tensor
    weight: Tensor
    text_length: int | None = None
    first: int = field(init=False, repr=False)  # smallest and largest selected position, or -1 if nothing is selected,
    last: int = field(init=False, repr=False)  # known without a host sync
    versions: tuple[int, int] | None = field(init=False, repr=False)  # of index and weight when they were checked

    def __post_init__(self) -> None:
        check_selection_fields(self.index, self.weight)
        _check_text_length(self.text_length)
        first = last = EMPTY
        if not torch.compiler.is_compiling():  # under tracing there are no values; the kernels check positions
            _check_values(self.index, self.weight)
            last = int(self.index.max())
            first = EMPTY if last == EMPTY else int(self.index.masked_fill(self.index == EMPTY, last).min())
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "last", last)
        object.__setattr__(self, "versions", _versions(self.index, self.weight))

    def __reduce__(self) -> Any:  # copies of the tensors have versions of their own
        self.check_unchanged()
        return _known_good, (self.index, self.weight, self.text_length, self.first, self.last)

    def check_unchanged(self) -> None:
        """Raises a RuntimeError if the tensors were modified in place since their values were checked."""
        if self.versions is not None and self.versions != _versions(self.index, self.weight):
            raise RuntimeError(
                "the tensors of this TokenSelection were modified in place after their values were checked: make "
                "another selection, TokenSelection(index, weight)"
            )

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
        """Selects the listed positions, each with weight one, so that a map is the attention mass on them.

        Args:
            positions: for each sequence of the batch a list of token positions (one phrase), or a list of such lists
                (G phrases, the same G for every sequence; a phrase may be empty). Tensors and arrays are accepted in
                place of lists, and any integer that ``operator.index`` accepts, except True and False.
            device: the device of the selection.

        Raises:
            ValueError: anything else, a negative position, or sequences with different numbers of phrases.

        Example:
            ``TokenSelection.from_positions([[1029, 1030], [1101]])`` selects one phrase for each of two sequences,
            ``TokenSelection.from_positions([[[1029], [1030]], [[1101], []]])`` selects two.
        """
        sequences = _lists(positions)
        if not isinstance(sequences, list) or not sequences:
            raise ValueError(f"positions must be a non-empty list with one entry per sequence, got {positions!r}")
        for b, sequence in enumerate(sequences):
            if not isinstance(sequence, list):
                raise ValueError(f"positions[{b}] must be a list of token positions or of such lists, got {sequence!r}")
        nested: list[list[Any]] = [[sequence] if _is_flat(sequence) else sequence for sequence in sequences]
        n_phrases = len(nested[0])
        for b, phrases in enumerate(nested):
            if len(phrases) != n_phrases:
                raise ValueError(
                    f"positions must have the same number of phrases for every sequence: positions[0] has {n_phrases}, "
                    f"positions[{b}] has {len(phrases)}"
                )
            for phrase in phrases:
                if not _is_flat(phrase) or any(not 0 <= p < 2**31 for p in phrase):
                    raise ValueError(f"positions[{b}] must be token positions between 0 and 2^31 - 1, got {phrase!r}")
        slots = max(1, max(sum(map(len, phrases)) for phrases in nested))
        index = torch.full((len(nested), slots), EMPTY, dtype=torch.int32, device="cpu")
        weight = torch.zeros(len(nested), n_phrases, slots, dtype=torch.float32, device="cpu")
        for b, phrases in enumerate(nested):
            start = 0
            for g, phrase in enumerate(phrases):
                stop = start + len(phrase)
                index[b, start:stop] = torch.tensor(phrase, dtype=torch.int32, device="cpu")
                weight[b, g, start:stop] = 1.0
                start = stop
        return cls(index, weight).to(device)

    @classmethod
    def from_mask(cls, mask: Tensor) -> TokenSelection:
        """Selects the non-zero entries of a mask over positions; a floating-point mask is the weights.

        Args:
            mask: bool or floating-point, ``[B, S]`` (one phrase) or ``[B, G, S]``.
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
        self.check_unchanged()
        index, weight = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.index, self.weight))
        return _known_good(index, weight, self.text_length, self.first, self.last)

    def shift(self, offset: int) -> TokenSelection:
        """Adds ``offset`` to all positions: from positions of a text to positions of keys, for
        :func:`star_kernels.attention` over keys in which the text starts at ``offset``.
        """
        if integers([offset]) is None:
            raise TypeError(f"offset must be an integer, got {offset!r}")
        if self.last != EMPTY and self.first + offset < 0:
            raise ValueError(f"offset must be at least {-self.first}, so that no position is negative, got {offset}")
        if self.last != EMPTY and self.last + offset >= 2**31:
            raise ValueError(f"offset must be below {2**31 - self.last}, so that positions are int32, got {offset}")
        self.check_unchanged()
        first, last = (EMPTY if position == EMPTY else position + offset for position in (self.first, self.last))
        index = torch.where(self.index == EMPTY, EMPTY, self.index + offset)
        return _known_good(index, self.weight, None, first, last)

    def differentiable(self) -> TokenSelection:
        """The same selection, of tensors that autograd can save: those made in inference mode are copied."""
        tensors = (self.index, self.weight)
        if not any(tensor.is_inference() for tensor in tensors):
            return self
        with torch.inference_mode(False):
            index, weight = (tensor.clone() for tensor in tensors)
        return _known_good(index, weight, self.text_length, self.first, self.last)

    def among_empty(self, before: int, after: int) -> TokenSelection:
        """The selection for a larger batch: ``before`` samples before and ``after`` samples after it select nothing."""
        self.check_unchanged()
        sides = ((self.index, EMPTY), (self.weight, 0.0))
        index, weight = (
            torch.cat([x.new_full((before, *x.shape[1:]), fill), x, x.new_full((after, *x.shape[1:]), fill)])
            for x, fill in sides
        )
        return _known_good(index, weight, self.text_length, self.first, self.last)


def _known_good(index: Tensor, weight: Tensor, text_length: int | None, first: int, last: int) -> TokenSelection:
    """A selection of values that were checked before; there are no checks and no host sync."""
    made = object.__new__(TokenSelection)
    versions = _versions(index, weight)
    fields = {
        "index": index,
        "weight": weight,
        "text_length": text_length,
        "first": first,
        "last": last,
        "versions": versions,
    }
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _versions(index: Tensor, weight: Tensor) -> tuple[int, int] | None:
    """The version counters, which every in-place change increments; None for tensors that have none."""
    if torch.compiler.is_compiling() or index.is_inference() or weight.is_inference():
        return None
    return index._version, weight._version


def _lists(value: Any) -> Any:
    """Converts tensors, arrays, sequences and integers to lists of int, recursively; returns anything else as is."""
    if hasattr(value, "tolist"):  # a tensor, an array, or a scalar of one
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_lists(item) for item in value]
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def integers(value: object) -> list[int] | None:
    """A list, tensor or array of integers as a list of int; None for anything else."""
    found = _lists(value)
    return found if _is_flat(found) else None


def _is_flat(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(p, int) and not isinstance(p, bool) for p in value)


def no_selection(given: object) -> TypeError:
    """The error for another type; select_tokens returns a selection and the names of its phrases."""
    pair = isinstance(given, tuple) and isinstance(next(iter(given), None), TokenSelection)
    hint = "; use its first element, as in selection, names = select_tokens(...)" if pair else ""
    return TypeError(f"selection must be a TokenSelection, got {type(given).__name__}{hint}")


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


def _check_text_length(length: object) -> None:
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise ValueError(f"text_length must be an integer of at least 1, or None, got {length!r}")


def _check_values(index: Tensor, weight: Tensor) -> None:
    if int(index.min()) < EMPTY:
        raise ValueError(f"index must be at least 0, or -1 for an empty slot, got {int(index.min())}")
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        bad = weight[~((weight >= 0) & weight.isfinite())][0]
        raise ValueError(f"weight must be finite and non-negative, got {float(bad)}")
