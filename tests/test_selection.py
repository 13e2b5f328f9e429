"""Token selections from positions and masks, and the values that they reject."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from star_kernels import TokenSelection

MANY = settings(max_examples=60, deadline=None)


def per_key(selection: TokenSelection, length: int) -> torch.Tensor:
    """The weight of each position of a sequence, [B, G, S]."""
    dense = torch.zeros(selection.batch, selection.phrases, length)
    for b in range(selection.batch):
        for t in range(selection.tokens):
            if selection.index[b, t] >= 0:
                dense[b, :, selection.index[b, t]] += selection.weight[b, :, t]
    return dense


def test_positions_of_one_phrase() -> None:
    selection = TokenSelection.from_positions([[1029, 1030], [1101]])
    assert (selection.batch, selection.phrases, selection.tokens) == (2, 1, 2)
    assert selection.index.tolist() == [[1029, 1030], [1101, -1]]
    assert selection.weight.tolist() == [[[1.0, 1.0]], [[1.0, 0.0]]]
    assert selection.index.dtype == torch.int32
    assert selection.weight.dtype == torch.float32
    assert (selection.first, selection.last) == (1029, 1101)


class Integer:
    """An integer type of another library."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize(
    "positions",
    [
        [[np.int64(3), np.uint8(4)]],
        [(3, 4)],
        [range(3, 5)],
        np.array([[3, 4]]),
        [np.array([3, 4], dtype=np.int32)],
        torch.tensor([[3, 4]]),
        [torch.tensor([3, 4], dtype=torch.int16)],
        [[torch.tensor(3), 4]],
        [[Integer(3), Integer(4)]],
        [[[np.int64(3)], torch.tensor([4])]],
        [np.array([[3], [4]])],
        torch.tensor([[[3], [4]]]),
    ],
)
def test_any_integer_type_is_a_position(positions: Any) -> None:
    selection = TokenSelection.from_positions(positions)
    assert selection.index.tolist() == [[3, 4]]
    assert selection.weight.sum() == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_do_not_matter(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            selection = TokenSelection.from_positions([[3, 4], [1]])
    finally:
        torch.set_default_dtype(before)
    assert selection.index.tolist() == [[3, 4], [1, -1]]
    assert selection.weight.tolist() == [[[1, 1]], [[1, 0]]]


def test_positions_of_several_phrases_share_the_slots() -> None:
    selection = TokenSelection.from_positions([[[1029], [1030]], [[1101], []]])
    assert (selection.batch, selection.phrases) == (2, 2)
    dense = per_key(selection, 1200)
    assert dense.nonzero().tolist() == [[0, 0, 1029], [0, 1, 1030], [1, 0, 1101]]


@pytest.mark.parametrize("positions", [[[]], [[], []], [[[], []]], [[[], []], [[], [3]]]])
def test_empty_phrases_and_sequences_are_allowed(positions: list) -> None:
    selection = TokenSelection.from_positions(positions)
    assert selection.tokens >= 1
    assert int(per_key(selection, 5).sum()) == sum(
        len(g) for sequence in positions for g in sequence if isinstance(g, list)
    )


phrase = st.lists(st.integers(0, 30), max_size=5)


@MANY
@given(st.integers(1, 3).flatmap(lambda g: st.lists(st.lists(phrase, min_size=g, max_size=g), min_size=1, max_size=4)))
def test_each_listed_position_adds_a_weight_of_one(positions: list[list[list[int]]]) -> None:
    dense = per_key(TokenSelection.from_positions(positions), 31)
    for b, sequence in enumerate(positions):
        for g, listed in enumerate(sequence):
            assert dense[b, g].tolist() == [float(listed.count(p)) for p in range(31)]


@MANY
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 20), st.integers(0, 1000), st.booleans())
def test_a_mask_becomes_the_weights(batch: int, phrases: int, length: int, seed: int, boolean: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, phrases, length, generator=generator)
    mask = mask < 0.3 if boolean else mask * (mask < 0.4)
    selection = TokenSelection.from_mask(mask)
    assert torch.equal(per_key(selection, length), mask.float())
    assert selection.tokens == max(1, int((mask != 0).any(dim=1).sum(dim=1).max()))
    assert torch.equal(per_key(TokenSelection.from_mask(mask[:, 0]), length), mask[:, :1].float())


def test_an_empty_mask_selects_nothing() -> None:
    selection = TokenSelection.from_mask(torch.zeros(2, 7, dtype=torch.bool))
    assert selection.index.tolist() == [[-1], [-1]]
    assert (selection.first, selection.last) == (-1, -1)


@MANY
@given(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=3), st.integers(0, 50))
def test_shift_moves_only_used_slots(positions: list[list[int]], offset: int) -> None:
    moved = TokenSelection.from_positions(positions).shift(offset)
    assert torch.equal(per_key(moved, 60), per_key(TokenSelection.from_positions(positions), 60).roll(offset, 2))
    assert torch.equal(moved.index == -1, TokenSelection.from_positions(positions).index == -1)
    assert moved.last == int(moved.index.max())
    assert moved.first == min((p for row in moved.index.tolist() for p in row if p >= 0), default=-1)
    back = moved.shift(-offset)
    assert torch.equal(back.index, TokenSelection.from_positions(positions).index)


def test_to_and_shift_keep_the_other_fields() -> None:
    selection = replace(TokenSelection.from_positions([[3, 5], [7]]), text_length=9)
    moved = selection.to("cpu")
    assert (moved.first, moved.last, moved.text_length) == (3, 7, 9)
    assert moved.shift(4).text_length is None  # positions of keys
    assert moved.among_empty(1, 0).text_length == 9
    assert torch.equal(moved.index, selection.index)
    assert torch.equal(moved.weight, selection.weight)
    assert selection.to("meta").device.type == "meta"


def test_a_selection_is_frozen() -> None:
    with pytest.raises(AttributeError):
        TokenSelection.from_positions([[1]]).index = torch.zeros(1, 1, dtype=torch.int32)  # type: ignore[misc]


INDEX = torch.tensor([[1, -1]], dtype=torch.int32)
WEIGHT = torch.ones(1, 1, 2)


@pytest.mark.parametrize(
    ("index", "weight", "error", "message"),
    [
        (INDEX.long(), WEIGHT, TypeError, "index must be a int32 tensor, got torch.int64"),
        ([[1, -1]], WEIGHT, TypeError, "index must be a int32 tensor, got list"),
        (INDEX, WEIGHT.double(), TypeError, "weight must be a float32 tensor, got torch.float64"),
        (INDEX, None, TypeError, "weight must be a float32 tensor, got NoneType"),
        (INDEX[0], WEIGHT, ValueError, r"index must have shape \[B, T\].*got \[2\]"),
        (INDEX[:, :0], WEIGHT[..., :0], ValueError, r"index must have shape \[B, T\].*got \[1, 0\]"),
        (INDEX, WEIGHT[0], ValueError, r"weight must have shape \[B, G, T\] = \[1, G, 2\], got \[1, 2\]"),
        (INDEX, torch.ones(2, 1, 2), ValueError, r"weight must have shape .*got \[2, 1, 2\]"),
        (INDEX, torch.ones(1, 0, 2), ValueError, r"weight must have shape .*got \[1, 0, 2\]"),
        (INDEX, torch.ones(1, 1, 3), ValueError, r"weight must have shape .*got \[1, 1, 3\]"),
        (INDEX, WEIGHT.to("meta"), ValueError, "weight must be on the device of index, cpu, got meta"),
        (INDEX - 1, WEIGHT, ValueError, "index must be at least 0, or -1 .*got -2"),
        (INDEX, -WEIGHT, ValueError, "weight must be finite and non-negative, got -1.0"),
        (INDEX, WEIGHT * torch.nan, ValueError, "weight must be finite and non-negative, got nan"),
        (INDEX, WEIGHT * torch.inf, ValueError, "weight must be finite and non-negative, got inf"),
    ],
)
def test_bad_fields_are_named(index: Any, weight: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        TokenSelection(index, weight)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([], "positions must be a non-empty list"),
        ("abc", "positions must be a non-empty list"),
        (3, "positions must be a non-empty list"),
        (np.zeros((0, 3), dtype=int), "positions must be a non-empty list"),
        (torch.ones(2), r"positions\[0\] must be a list of token positions or of such lists, got 1.0"),
        ([3], r"positions\[0\] must be a list of token positions or of such lists, got 3"),
        ([[1], b"ab"], r"positions\[1\] must be a list of token positions or of such lists, got b'ab'"),
        ([[3.0]], r"positions\[0\] must be token positions between 0 and 2\^31 - 1, got 3.0"),
        ([[np.float64(3)]], r"positions\[0\] must be token positions between 0 and 2\^31 - 1, got 3.0"),
        (torch.tensor([[3.0]]), r"positions\[0\] must be token positions between 0 and 2\^31 - 1, got 3.0"),
        (np.array([[True]]), r"positions\[0\] must be token positions between 0 and 2\^31 - 1, got True"),
        ([[torch.tensor(True)]], r"positions\[0\] must be token positions between 0 and 2\^31 - 1, got True"),
        (torch.tensor([[1, -1]]), r"positions\[0\] must be token positions between 0 and 2\^31 - 1, got \[1, -1\]"),
        ([["3"]], r"positions\[0\] must be token positions between 0 and 2\^31 - 1, got '3'"),
        ([[1, -1]], r"positions\[0\] must be token positions between 0 and 2\^31 - 1, got \[1, -1\]"),
        (
            [[1], [[1], [2]]],
            r"positions must have the same number of phrases for every seq.*1.*positions\[1\] has 2",
        ),
        ([[[1], 2]], r"positions\[0\] must be token positions"),
        ([[1.5]], r"positions\[0\] must be token positions"),
        ([[True]], r"positions\[0\] must be token positions"),
    ],
)
def test_bad_positions_are_named(positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenSelection.from_positions(positions)


def test_a_position_beyond_32_bits_is_named() -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        TokenSelection.from_positions([[2**40]])


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            torch.ones(2, 3, dtype=torch.int64),
            TypeError,
            "mask must be a bool or floating-point tensor, got torch.int64",
        ),
        ([[True]], TypeError, "mask must be a bool or floating-point tensor, got list"),
        (torch.ones(3), ValueError, r"mask must have shape \[B, S\] or \[B, G, S\].*got \[3\]"),
        (torch.ones(2, 0), ValueError, r"mask must have shape .*got \[2, 0\]"),
        (torch.ones(1, 1, 1, 1), ValueError, r"mask must have shape .*got \[1, 1, 1, 1\]"),
        (-torch.ones(1, 2), ValueError, "weight must be finite and non-negative, got -1.0"),
        (torch.full((1, 2), torch.nan), ValueError, "weight must be finite and non-negative, got nan"),
    ],
)
def test_bad_masks_are_named(mask: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        TokenSelection.from_mask(mask)


@pytest.mark.parametrize("length", [0, -1, 2.5, True, (0, 7)])
def test_a_bad_text_length_is_named(length: Any) -> None:
    selection = TokenSelection.from_positions([[3]])
    with pytest.raises(ValueError, match="text_length must be an integer of at least 1, or None, got"):
        replace(selection, text_length=length)


def test_a_shift_below_zero_is_named() -> None:
    with pytest.raises(ValueError, match="offset must be at least -2, so that no position is negative, got -3"):
        TokenSelection.from_positions([[2, 5]]).shift(-3)


def test_a_copy_of_a_selection_that_was_changed_in_place_is_an_error() -> None:
    selection = TokenSelection.from_positions([[0], [1]])
    selection.index.fill_(50)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="modified in place"):
            copied(selection)


@pytest.mark.parametrize(
    ("offset", "error", "message"),
    [
        (1.5, TypeError, "offset must be an integer, got 1.5"),
        (True, TypeError, "offset must be an integer, got True"),
        (2**31 - 3, ValueError, f"offset must be below {2**31 - 5}, so that positions are int32"),
    ],
)
def test_a_shift_that_is_no_position_is_an_error(offset: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TokenSelection.from_positions([[5]]).shift(offset)
