"""Validation of the arguments of attention, in layout [B, H, S, D] unless an axis is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from star_kernels.attention.arguments import MapArguments
from star_kernels.checks import check_dense
from star_kernels.selection import TokenSelection, check_selection_fields, no_selection

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (int, torch.SymInt)


def autocasted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, cast to the dtype of ``torch.autocast`` if it is active, as ``F.scaled_dot_product_attention`` does.

    Norms of a model may return query and key in float32 while value has 16 bits.
    """
    first = tensors[0]
    kind = first.device.type if isinstance(first, Tensor) else ""
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def check_qkv(query: Tensor, key: Tensor, value: Tensor, sequence_axis: int) -> None:
    """Raises unless query, key and value are valid and agree; ``sequence_axis`` is 2, or 1 in layout "bshd".

    Without a value, pass the key in its place.
    """
    shape = "[B, H, S, D]" if sequence_axis == 2 else "[B, S, H, D]"
    tensors: tuple[tuple[str, Tensor], ...] = (("query", query), ("key", key))
    if value is not key:
        tensors = (*tensors, ("value", value))
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested:
            check_dense(name, tensor)
        if tensor.ndim != 4 or not tensor.numel():
            raise ValueError(f"{name} must have shape {shape}, none of them 0, got {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
        if tensor is query:
            dtype, device = query.dtype, query.device
        elif tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{name} must have the dtype and device of query, {dtype} on {device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    queries, keys = query.shape, key.shape
    if value is not key and keys != value.shape:
        raise ValueError(f"value must have the shape of key, {list(keys)}, got {list(value.shape)}")
    heads = 3 - sequence_axis
    if keys[0] != queries[0] or keys[heads] != queries[heads] or keys[3] != queries[3]:
        raise ValueError(
            f"key must agree with query in batch, heads and head dimension: {shape} is {list(queries)} for query, "
            f"got {list(keys)}"
        )


def check_selection(selection: TokenSelection, query: Tensor, *, length: int) -> None:
    """Raises unless the selection has this batch size and device, and lies within a sequence of ``length``."""
    if not isinstance(selection, TokenSelection):
        raise no_selection(selection)
    if selection.index.device != query.device:
        raise ValueError(f"selection must be on the device of query, {query.device}, got {selection.index.device}")
    if selection.index.shape[0] != query.shape[0]:
        raise ValueError(f"selection must have the batch of query, {query.shape[0]}, got {selection.index.shape[0]}")
    # A compiled graph would be specialised to this number, so in a graph only the kernels check it.
    if not torch.compiler.is_compiling() and selection.last >= length:
        raise ValueError(f"selection.index must be below the length of the sequence, {length}, got {selection.last}")


def check_key_mask(key_mask: Tensor | None, query: Tensor, length: int) -> None:
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a bool tensor, true for the keys that take part, got {got}")
    check_dense("key_mask", key_mask)
    if key_mask.shape != (query.shape[0], length):
        raise ValueError(f"key_mask must have shape [B, Sk] = [{query.shape[0]}, {length}], got {list(key_mask.shape)}")
    if key_mask.device != query.device:
        raise ValueError(f"key_mask must be on the device of query, {query.device}, got {key_mask.device}")


def check_attn_mask(attn_mask: Tensor | None, query: Tensor, length: int) -> None:
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool:
        got = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise TypeError(f"attn_mask must be a bool tensor, true for the pairs that take part, got {got}")
    check_dense("attn_mask", attn_mask)
    full = (*query.shape[:3], length)
    if attn_mask.ndim != 4 or not all(
        [n == m or (n == 1 and d < 3) for d, (n, m) in enumerate(zip(attn_mask.shape, full, strict=True))]
    ):
        raise ValueError(
            f"attn_mask must have shape [B or 1, H or 1, Sq or 1, Sk], of [B, H, Sq, Sk] = {list(full)}, "
            f"got {list(attn_mask.shape)}"
        )
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the device of query, {query.device}, got {attn_mask.device}")


def check_lse(lse: Tensor, query: Tensor) -> None:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not isinstance(lse, Tensor) or lse.dtype != wide:
        got = lse.dtype if isinstance(lse, Tensor) else type(lse).__name__
        raise TypeError(f"lse must be a {str(wide).removeprefix('torch.')} tensor, got {got}")
    check_dense("lse", lse)
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse must have shape [B, H, Sq] = {list(query.shape[:3])}, got {list(lse.shape)}")
    if lse.device != query.device:
        raise ValueError(f"lse must be on the device of query, {query.device}, got {lse.device}")


def check_statistics(names: Sequence[str], known: Sequence[str], text_to_image: bool) -> None:
    accepted = f"statistics must be a sequence of {', '.join(known)}"
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{accepted}, got {names!r}")
    for name in names:
        if name not in known:
            raise ValueError(f"{accepted}, got {name!r}")
    if names and text_to_image:
        raise ValueError(f"statistics require direction='image_to_text', got 'text_to_image' and {list(names)}")


def resolve_rows(rows: slice | tuple[int, int] | None, length: int) -> tuple[int, int]:
    """The row range as (start, length), within a sequence of ``length``."""
    if rows is None:
        return 0, length
    if isinstance(rows, slice):
        start, stop, step = rows.indices(length)
        count = stop - start
        if step != 1 or count <= 0:
            raise ValueError(f"rows must be a non-empty slice of step 1 within {length} positions, got {rows}")
        return start, count
    if not (
        isinstance(rows, tuple)
        and len(rows) == 2
        and all([isinstance(n, _INTEGERS) and not isinstance(n, bool) for n in rows])
    ):
        raise TypeError(f"rows must be a slice or a tuple (start, length) of two integers, got {rows!r}")
    start, count = rows
    if start < 0 or count <= 0 or start + count > length:
        raise ValueError(f"rows must lie within {length} positions, got (start, length) = {rows}")
    return start, count


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores, 1 / sqrt(D) by default."""
    if scale is None:
        return float(head_dim**-0.5)
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number, got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def check_operator(query: Tensor, key: Tensor, value: Tensor, arguments: MapArguments) -> None:
    """Checks for callers of ``torch.ops.star_kernels``; the kernels themselves check positions."""
    check_qkv(query, key, value, 2)
    if query.dtype == torch.float64:
        raise TypeError("query must be float32, float16 or bfloat16, got torch.float64")
    index = arguments.index
    check_selection_fields(index, arguments.weight)
    if index.shape[0] != query.shape[0] or index.device != query.device:
        raise ValueError(
            f"index must have the batch and the device of query, {query.shape[0]} on {query.device}, "
            f"got {list(index.shape)} on {index.device}"
        )
    check_key_mask(arguments.key_mask, query, key.shape[2])
    check_attn_mask(arguments.attn_mask, query, key.shape[2])
    resolve_rows((arguments.start, arguments.n_rows), (key if arguments.text_to_image else query).shape[2])


def check_like(name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype, query: Tensor) -> None:
    """Raises unless a result or its gradient has this shape and dtype, and the device of query."""
    if tensor is None or (list(tensor.shape), tensor.dtype, tensor.device) == (list(shape), dtype, query.device):
        return
    raise ValueError(
        f"{name} must have shape {list(shape)} and be {dtype} on {query.device}, got {list(tensor.shape)}, "
        f"{tensor.dtype} on {tensor.device}"
    )
