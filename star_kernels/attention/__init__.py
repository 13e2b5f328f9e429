"""Exact attention that also returns token-aggregated attention maps, and the maps alone from a log-sum-exp."""

from __future__ import annotations

from functools import cache
from operator import index as index_of
from typing import NamedTuple

import torch
from torch import Tensor

from star_kernels.attention import naive, ops, tuning, vendor
from star_kernels.attention.checks import (
    autocasted,
    check_key_mask,
    check_lse,
    check_qkv,
    check_selection,
    resolve_rows,
    resolve_scale,
)
from star_kernels.checks import check_flag, warn
from star_kernels.operators import constants
from star_kernels.selection import TokenSelection

__all__ = ["AttentionOutput", "attention", "attention_maps"]

BACKENDS = ("auto", "naive", "triton", "vendor", *vendor.KERNELS)
DIRECTIONS = ("image_to_text", "text_to_image")


class AttentionOutput(NamedTuple):
    """What :func:`attention` returns; ``lse`` is None unless it was asked for."""

    out: Tensor
    maps: Tensor
    lse: Tensor | None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: TokenSelection,
    *,
    rows: slice | tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    layout: str = "bhsd",
    reduce_heads: bool = True,
    return_lse: bool = False,
    backend: str = "auto",
) -> AttentionOutput:
    """Softmax attention and, out of the same pass, how much each row attends to the selected tokens.

    ``out = softmax(scale * query key^T) value``, exactly as ``torch.nn.functional.scaled_dot_product_attention``, and
    ``maps[b, g, r] = mean_h sum_t weight[b, g, t] * P[b, h, rows[r], index[b, t]]`` with P the softmax over all keys.
    No matrix of size [Sq, Sk] is ever held, in the backward pass neither. All results are differentiable in query,
    key and value, once and in reverse mode (``backend="naive"``: in every mode).

    Args:
        query: ``[B, H, Sq, D]`` (``[B, Sq, H, D]`` with layout "bshd"); float32, float16 or bfloat16, any strides.
            float64 runs the definition in plain PyTorch. Under ``torch.autocast`` all three are cast to its dtype
            first, as SDPA's are.
        key, value: ``[B, H, Sk, D]`` in the same layout, dtype and device.
        selection: which keys are aggregated, with which weights, in G groups.
        rows: the query positions that get a map, as a slice or ``(start, length)``; all by default. Other rows cost
            nothing.
        key_mask: bool ``[B, Sk]``, true where a key takes part. A row without any key gives 0 and an lse of -inf.
        scale: factor of the scores, ``1 / sqrt(D)`` by default.
        layout: "bhsd" or "bshd".
        reduce_heads: average the maps over heads; else they are ``[B, G, H, R]``.
        return_lse: also return the natural log-sum-exp of the scaled scores, float32 ``[B, H, Sq]``.
        backend: "auto"; "vendor" (PyTorch's fused attention, and a map kernel that reads its log-sum-exp); on CUDA
            "triton" (maps in the epilogue of the flash pass), or one of PyTorch's kernels, "cudnn", "flash" or
            "efficient"; or "naive" (the definition, which materialises all probabilities). On CUDA "auto" takes what
            :mod:`star_kernels.attention.tuning` says. PyTorch's kernels take no ``key_mask`` there; "flash" is what
            ``torch.nn.attention.activate_flash_attention_impl`` has put in its place.

    Returns:
        ``(out, maps, lse)``: out like query, maps float32 ``[B, G, R]``.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or range; the message names it.
    """
    axis = _sequence_axis(layout)
    query, key, value = autocasted(query, key, value)
    check_qkv(query, key, value, axis)
    if axis == 1:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    check_selection(selection, query, length=key.shape[2])
    check_key_mask(key_mask, query, key.shape[2])
    start, length = resolve_rows(rows, query.shape[2])
    scale = resolve_scale(scale, query.shape[3])
    check_flag("reduce_heads", reduce_heads)
    check_flag("return_lse", return_lse)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    device, dtype, head_dim = query.device.type, query.dtype, index_of(query.shape[3])  # constant in a graph
    if backend == "auto":
        backend = choose_backend(device, dtype, head_dim, key_mask is not None)
    elif problem := obstacle(backend, device, dtype, head_dim, key_mask is not None):
        raise ValueError(
            f"backend {backend!r} cannot run here: {problem}; got {dtype}, head dimension {head_dim}, on {device}"
        )
    index, (weight,) = selection.index, constants(selection.weight)
    if backend == "naive":
        out, maps, lse = naive.attention(
            query, key, value, index, weight, key_mask, (start, length), scale, reduce_heads
        )
    else:
        out, maps, lse = ops.ATTENTION(
            query, key, value, index, weight, key_mask, start, length, scale, reduce_heads, backend
        )
    return AttentionOutput(out.transpose(1, 2) if axis == 1 else out, maps, lse if return_lse else None)


def attention_maps(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    selection: TokenSelection,
    *,
    direction: str = "image_to_text",
    rows: slice | tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    layout: str = "bhsd",
    reduce_heads: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The maps of :func:`attention` from any attention that returned its log-sum-exp: P = exp(scale * q k - lse).

    Args:
        query, key, key_mask, scale, layout, reduce_heads: as the attention that gave ``lse`` got them.
        lse: natural log-sum-exp of the scaled scores over all keys, float32 ``[B, H, Sq]``.
        direction: "image_to_text": selected tokens are keys and rows are queries, as in :func:`attention`;
            "text_to_image": selected tokens are queries and rows are keys, so a map is where those tokens look.
        rows: positions that get a map (queries, or keys with "text_to_image"); all by default.
        backend: "auto" or "naive".

    Returns:
        float32 ``[B, G, R]``, or ``[B, G, H, R]`` without ``reduce_heads``; differentiable in query, key and lse.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or range; the message names it.
    """
    axis = _sequence_axis(layout)
    query, key = autocasted(query, key)
    check_qkv(query, key, key, axis)
    if axis == 1:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    text_to_image = direction == "text_to_image"
    gathered, dense = (query, key) if text_to_image else (key, query)
    check_selection(selection, query, length=gathered.shape[2])
    check_lse(lse, query)
    check_key_mask(key_mask, query, key.shape[2])
    start, length = resolve_rows(rows, dense.shape[2])
    scale = resolve_scale(scale, query.shape[3])
    check_flag("reduce_heads", reduce_heads)
    if backend not in ("auto", "naive"):
        raise ValueError(f"backend must be auto or naive, got {backend!r}")
    index, (weight,) = selection.index, constants(selection.weight)
    if backend == "naive" or query.dtype == torch.float64:
        return naive.attention_maps(
            query,
            key,
            lse,
            index,
            weight,
            key_mask,
            (start, length),
            scale,
            reduce_heads,
            text_to_image,
        )
    maps: Tensor = ops.ATTENTION_MAPS(
        query,
        key,
        lse,
        index,
        weight,
        key_mask,
        start,
        length,
        scale,
        reduce_heads,
        text_to_image,
    )
    return maps


@torch.compiler.assume_constant_result
def choose_backend(device: str, dtype: torch.dtype, head_dim: int, masked: bool = False) -> str:
    """What "auto" means for these inputs; on a GPU "auto" again, for the operator to look up the sizes.

    Where a GPU gets the plain definition, it warns once.
    """
    if dtype == torch.float64:
        return "naive"
    if device == "cpu":
        return "vendor"
    problem = obstacle("auto", device, dtype, head_dim, masked)
    if problem is None:
        return "auto"
    _warn_naive(f"{problem}; got {dtype}, head dimension {head_dim}{', a key_mask' if masked else ''}, on {device}")
    return "naive"


@torch.compiler.assume_constant_result
def obstacle(backend: str, device: str, dtype: torch.dtype, head_dim: int, masked: bool = False) -> str | None:
    """What keeps a backend from these inputs, if anything."""
    if backend == "naive":
        return None
    if dtype == torch.float64:
        return "it has no float64"
    if backend == "vendor" and device == "cpu":
        return None
    if device != "cuda":
        return "it serves CUDA tensors"
    if masked and backend not in ("auto", "triton"):
        return "it takes no key_mask"
    if backend in ("triton", *vendor.KERNELS) or masked:
        return tuning.obstacle("triton" if backend == "auto" else backend, dtype, head_dim)
    first = None
    for kernel in ("triton", *vendor.KERNELS)[backend == "vendor" :]:
        if (problem := tuning.obstacle(kernel, dtype, head_dim)) is None:
            return None
        first = first or problem
    return first


@cache
def _warn_naive(problem: str) -> None:
    warn(f"star_kernels.attention materialises all probabilities: no other backend can run here: {problem}")


def _sequence_axis(layout: str) -> int:
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout must be 'bhsd' or 'bshd', got {layout!r}")
    return 2 if layout == "bhsd" else 1
