"""Bad input to the attention functions: an error that names the argument, what came and what is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_kernels import TokenSelection, attention, attention_maps

Q, K = torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 9, 8)
SELECTION = TokenSelection.from_positions([[1, 6], [0]])
LSE = torch.zeros(2, 3, 7)
MASK = torch.ones(2, 9, dtype=torch.bool)
PAIRS = torch.ones(2, 1, 7, 9, dtype=torch.bool)

SHARED = [
    ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
    ({"query": Q[0]}, ValueError, r"query must have shape \[B, H, S, D\].*got \[3, 7, 8\]"),
    ({"query": Q[:, :, :0]}, ValueError, r"query must have shape \[B, H, S, D\], none of them 0, got \[2, 3, 0, 8\]"),
    ({"query": Q.int()}, TypeError, "query must be float32, float16, bfloat16 or float64, got torch.int32"),
    (
        {"key": K.half()},
        ValueError,
        "key must have the dtype and device of query, torch.float32 on cpu, got torch.float16",
    ),
    ({"key": K.to("meta")}, ValueError, "key must have the dtype and device of query, .* got torch.float32 on meta"),
    ({"selection": [[1]]}, TypeError, "selection must be a TokenSelection, got list"),
    ({"selection": SELECTION.to("meta")}, ValueError, "selection must be on the device of query, cpu, got meta"),
    (
        {"selection": TokenSelection.from_positions([[1]] * 3)},
        ValueError,
        "selection must have the batch of query, 2, got 3",
    ),
    ({"key_mask": MASK.int()}, TypeError, "key_mask must be a bool tensor, .* got torch.int32"),
    ({"key_mask": [True]}, TypeError, "key_mask must be a bool tensor, .* got list"),
    ({"key_mask": MASK[:, :7]}, ValueError, r"key_mask must have shape \[B, Sk\] = \[2, 9\], got \[2, 7\]"),
    ({"key_mask": MASK[:1]}, ValueError, r"key_mask must have shape .*got \[1, 9\]"),
    ({"key_mask": MASK.to("meta")}, ValueError, "key_mask must be on the device of query, cpu, got meta"),
    ({"rows": slice(0, 4, 2)}, ValueError, "rows must be a non-empty slice of step 1 within 7 positions, got slice"),
    ({"rows": slice(7, None)}, ValueError, "rows must be a non-empty slice of step 1 within 7 positions, got slice"),
    ({"rows": slice(5, 2)}, ValueError, "rows must be a non-empty slice of step 1 within 7 positions, got slice"),
    ({"rows": (5, 3)}, ValueError, r"rows must lie within 7 positions, got \(start, length\) = \(5, 3\)"),
    ({"rows": (-1, 3)}, ValueError, r"rows must lie within 7 positions, got \(start, length\) = \(-1, 3\)"),
    ({"rows": (0, 0)}, ValueError, r"rows must lie within 7 positions, got \(start, length\) = \(0, 0\)"),
    ({"rows": [0, 3]}, TypeError, r"rows must be a slice or a tuple \(start, length\) of two integers, got \[0, 3\]"),
    ({"rows": (0.0, 3)}, TypeError, r"rows must be a slice or a tuple \(start, length\) of two integers"),
    ({"rows": 3}, TypeError, "rows must be a slice or a tuple .*got 3"),
    ({"layout": "sbhd"}, ValueError, "layout must be 'bhsd' or 'bshd', got 'sbhd'"),
    ({"layout": "bshd"}, ValueError, r"key must agree with query in batch, heads .*got \[2, 3, 9, 8\]"),
    ({"backend": "xformers"}, ValueError, "backend must be .*auto.*got 'xformers'"),
    ({"backend": None}, ValueError, "backend must be .*auto.*got None"),
    ({"reduce_heads": None}, TypeError, "reduce_heads must be True or False, got None"),
    ({"scale": "large"}, (TypeError, ValueError), "scale .*large"),
    ({"scale": torch.nan}, ValueError, "scale .*nan"),
    ({"scale": torch.inf}, ValueError, "scale .*inf"),
]
ATTENTION = [
    ({"return_lse": "yes"}, TypeError, "return_lse must be True or False, got 'yes'"),
    ({"value": K[:, :, :5]}, ValueError, r"value must have the shape of key, \[2, 3, 9, 8\], got \[2, 3, 5, 8\]"),
    ({"value": K.bfloat16()}, ValueError, "value must have the dtype and device of query, .*got torch.bfloat16"),
    ({"key": K[:1], "value": K[:1]}, ValueError, r"key must agree with query in batch.*got \[1, 3, 9, 8\]"),
    (
        {"key": K[:, :2], "value": K[:, :2]},
        ValueError,
        r"key must agree with query in batch, heads.*got \[2, 2, 9, 8\]",
    ),
    ({"key": K[..., :4], "value": K[..., :4]}, ValueError, r"key must agree with query .*got \[2, 3, 9, 4\]"),
    (
        {"selection": TokenSelection.from_positions([[1], [9]])},
        ValueError,
        "selection.index must be below the length of the sequence, 9, got 9",
    ),
]
MAPS = [
    ({"key": K[:1]}, ValueError, r"key must agree with query in batch.*got \[1, 3, 9, 8\]"),
    ({"lse": LSE[:, :2]}, ValueError, r"lse must have shape \[B, H, Sq\] = \[2, 3, 7\], got \[2, 2, 7\]"),
    ({"lse": torch.zeros(2, 3, 9)}, ValueError, r"lse must have shape \[B, H, Sq\] = \[2, 3, 7\], got \[2, 3, 9\]"),
    ({"lse": LSE.half()}, TypeError, "lse must be a float32 tensor, got torch.float16"),
    ({"lse": "none"}, TypeError, "lse must be a float32 tensor, got str"),
    ({"attn_mask": PAIRS.float()}, TypeError, "attn_mask must be a bool tensor, .*, got torch.float32"),
    ({"attn_mask": "causal"}, TypeError, "attn_mask must be a bool tensor, .*, got str"),
    (
        {"attn_mask": PAIRS[:, :, :, :1]},
        ValueError,
        r"attn_mask must have shape \[B or 1, H or 1, Sq or 1, Sk\], of \[B, H, Sq, Sk\] = \[2, 3, 7, 9\], "
        r"got \[2, 1, 7, 1\]",
    ),
    ({"attn_mask": PAIRS[:, 0]}, ValueError, r"attn_mask must have shape .*, got \[2, 7, 9\]"),
    ({"attn_mask": PAIRS.expand(2, 2, 7, 9)}, ValueError, r"attn_mask must have shape .*, got \[2, 2, 7, 9\]"),
    ({"attn_mask": PAIRS.mT}, ValueError, r"attn_mask must have shape .*, got \[2, 1, 9, 7\]"),
    ({"attn_mask": PAIRS.to("meta")}, ValueError, "attn_mask must be on the device of query, cpu, got meta"),
    ({"lse": LSE.to("meta")}, ValueError, "lse must be on the device of query, cpu, got meta"),
    ({"direction": "both"}, ValueError, "direction must be one of image_to_text, text_to_image, got 'both'"),
    (
        {"selection": TokenSelection.from_positions([[1], [9]])},
        ValueError,
        "selection.index must be below the length of the sequence, 9, got 9",
    ),
    (
        {"selection": TokenSelection.from_positions([[1], [7]]), "direction": "text_to_image"},
        ValueError,
        "selection.index must be below the length of the sequence, 7, got 7",
    ),
    ({"rows": (8, 2), "direction": "text_to_image"}, ValueError, "rows must lie within 9 positions"),
]


def ids(rows: list) -> list[str]:
    return [f"{'-'.join(changed)}-{number}" for number, (changed, *_) in enumerate(rows)]


@pytest.mark.parametrize(("changed", "error", "message"), SHARED + ATTENTION, ids=ids(SHARED + ATTENTION))
def test_bad_input_to_attention_is_an_error_that_names_it(changed: dict, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        attention(**{"query": Q, "key": K, "value": K, "selection": SELECTION, **changed})


@pytest.mark.parametrize(("changed", "error", "message"), SHARED + MAPS, ids=ids(SHARED + MAPS))
def test_bad_input_to_attention_maps_is_an_error_that_names_it(changed: dict, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        attention_maps(**{"query": Q, "key": K, "lse": LSE, "selection": SELECTION, **changed})


def test_good_input_is_accepted() -> None:
    attention(Q, K, K, SELECTION, rows=slice(0, 100), key_mask=MASK)
    attention_maps(Q, K, LSE, SELECTION, rows=(6, 1))
    attention_maps(Q, K, LSE, SELECTION, direction="text_to_image", rows=(8, 1))


def test_the_kernel_rejects_an_index_past_the_sequence_too() -> None:
    far = TokenSelection.from_positions([[1], [9]])
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"selection\.index|out of bounds"):
        torch.ops.star_kernels.attention(Q, K, K, far.index, far.weight, None, 0, 7, 0.3, True, "vendor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_rejects_an_index_past_the_sequence_with_the_same_error(dtype: torch.dtype) -> None:
    query, key, far = Q.to(dtype), K.to(dtype), TokenSelection.from_positions([[1], [9]])
    with pytest.raises(ValueError, match=r"selection\.index must be below the length of the sequence, 9, got 9"):
        attention(query, key, key, far, backend="naive")
    with pytest.raises(ValueError, match=r"selection\.index must be below the length of the sequence, 9, got 9"):
        attention_maps(query, key, LSE.to(dtype), far, backend="naive")


def test_an_operator_rejects_rows_outside_the_sequence() -> None:
    arguments = (Q, K, LSE, None, SELECTION.index, SELECTION.weight, None)
    for start, n_rows in ((5, 3), (-1, 3)):
        with pytest.raises((ValueError, RuntimeError), match=r"rows|size|range"):
            torch.ops.star_kernels.attention_maps(*arguments, start, n_rows, 0.3, True, False)


def test_heads_longer_than_the_native_limit_run_in_pytorch() -> None:
    long = torch.randn(1, 1, 3, 2048)
    selection = TokenSelection.from_positions([[1]])
    maps = attention(long, long, long, selection).maps
    torch.testing.assert_close(maps, attention(long, long, long, selection, backend="naive").maps, rtol=1e-4, atol=1e-5)
