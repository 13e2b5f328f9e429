"""The public functions: validation, choice of the backend, and the call of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as index_of
from typing import NamedTuple, overload

import torch
from torch import Tensor

from star_kernels.attention import direct, dispatch, naive, ops
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.checks import (
    autocasted,
    check_attn_mask,
    check_key_mask,
    check_lse,
    check_qkv,
    check_selection,
    check_statistics,
    resolve_rows,
    resolve_scale,
)
from star_kernels.attention.summaries import STATISTICS, AttentionStatistics, maps_and_statistics
from star_kernels.checks import check_flag
from star_kernels.operators import constant, constants
from star_kernels.selection import TokenSelection

DIRECTIONS = ("image_to_text", "text_to_image")


class AttentionOutput(NamedTuple):
    """The results of :func:`attention`; ``lse`` is None unless ``return_lse`` is set."""

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
    detach_maps: bool = False,
    backend: str = "auto",
) -> AttentionOutput:
    """Softmax attention that also returns how much each row attends to the selected tokens, from the same pass.

    ``out = softmax(scale * query key^T) value``, exactly as ``torch.nn.functional.scaled_dot_product_attention``, and
    ``maps[b, g, r] = mean_h sum_t weight[b, g, t] * P[b, h, rows[r], index[b, t]]`` with P the softmax over all keys.
    No [Sq, Sk] matrix is materialised, forward or backward. All results are differentiable with respect to query, key
    and value, once and in reverse mode (``backend="naive"``: in every mode).

    Args:
        query: ``[B, H, Sq, D]`` (``[B, Sq, H, D]`` with layout "bshd"); float32, float16 or bfloat16, any strides.
            float64 runs the reference implementation in plain PyTorch. Under ``torch.autocast`` query, key and value
            are cast to its dtype first, as for SDPA.
        key, value: ``[B, H, Sk, D]`` in the same layout, dtype and device.
        selection: which keys are aggregated, and their weights in each of G phrases.
        rows: the query positions with a map, as a slice or ``(start, length)``; all by default. Maps of other rows are
            not computed.
        key_mask: bool ``[B, Sk]``, true for the keys that take part. For a row without any key the output and the maps
            are 0 and the log-sum-exp is -inf.
        scale: factor of the scores, ``1 / sqrt(D)`` by default.
        layout: "bhsd" or "bshd".
        reduce_heads: average the maps over heads; if False, they are ``[B, G, H, R]``.
        return_lse: also return the natural log-sum-exp of the scaled scores, float32 ``[B, H, Sq]``.
        detach_maps: return maps and log-sum-exp as constants, without a gradient. Gradients of the output are then
            computed by PyTorch's own autograd node wherever its kernel is the one to run.
        backend: "auto"; "vendor" (PyTorch's fused attention, followed by a map kernel that reads its log-sum-exp);
            "triton" (CUDA only: maps in the epilogue of the flash attention kernel); "hopper" (Hopper GPUs only: the
            same in CUDA C++, for 16 bits and head dimensions 64 and 128); "cudnn", "flash" or "efficient" (CUDA only:
            one of PyTorch's kernels); or "naive" (the reference implementation, which materialises all
            probabilities). On CUDA "auto" selects by measurement, see :mod:`star_kernels.attention.dispatch`;
            PyTorch's kernels do not support ``key_mask`` on CUDA, and "flash" is the implementation set by
            ``torch.nn.attention.activate_flash_attention_impl``.

    Returns:
        ``(out, maps, lse)``: out like query, maps float32 ``[B, G, R]``.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or range; the message names it.
    """
    axis = 2 if layout == "bhsd" else _sequence_axis(layout)
    flags = type(reduce_heads) is type(return_lse) is type(detach_maps) is bool
    if flags and not torch.compiler.is_dynamo_compiling():
        found = direct.attention(
            query, key, value, selection, axis, rows, key_mask, scale, reduce_heads, detach_maps, backend
        )
        if found is not None:
            out, maps, lse = found
            return AttentionOutput(out if axis == 2 else out.transpose(1, 2), maps, lse if return_lse else None)
    query, key, value = autocasted(query, key, value)
    check_qkv(query, key, value, axis)
    if axis == 1:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    keys, head_dim = key.shape[2], query.shape[3]
    check_selection(selection, query, length=keys)
    check_key_mask(key_mask, query, keys)
    start, n_rows = resolve_rows(rows, query.shape[2])
    scale = resolve_scale(scale, head_dim)
    check_flag("reduce_heads", reduce_heads)
    check_flag("return_lse", return_lse)
    check_flag("detach_maps", detach_maps)
    if backend not in dispatch.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(dispatch.BACKENDS)}, got {backend!r}")
    device, dtype, head_dim = query.device.type, query.dtype, index_of(head_dim)  # constant in a graph
    if backend == "auto":
        backend = dispatch.choose_backend(device, dtype, head_dim, key_mask is not None)
    elif problem := dispatch.obstacle(backend, device, dtype, head_dim, key_mask is not None):
        raise ValueError(
            f"backend {backend!r} cannot run here: {problem}; got {dtype}, head dimension {head_dim}, on {device}"
        )
    flat = selection.index, constant(selection.weight), key_mask, start, n_rows, scale, reduce_heads
    if backend == "naive":
        out, maps, lse = naive.attention(query, key, value, MapArguments(*flat))
    else:
        out, maps, lse = ops.ATTENTION(query, key, value, *flat, backend)
    if detach_maps:
        maps, lse = constants(maps, lse)
    return AttentionOutput(out.transpose(1, 2) if axis == 1 else out, maps, lse if return_lse else None)


@overload
def attention_maps(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    selection: TokenSelection,
    *,
    direction: str = ...,
    rows: slice | tuple[int, int] | None = ...,
    key_mask: Tensor | None = ...,
    attn_mask: Tensor | None = ...,
    scale: float | None = ...,
    layout: str = ...,
    reduce_heads: bool = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def attention_maps(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    selection: TokenSelection,
    *,
    direction: str = ...,
    rows: slice | tuple[int, int] | None = ...,
    key_mask: Tensor | None = ...,
    attn_mask: Tensor | None = ...,
    scale: float | None = ...,
    layout: str = ...,
    reduce_heads: bool = ...,
    backend: str = ...,
    statistics: Sequence[str],
) -> AttentionStatistics: ...


def attention_maps(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    selection: TokenSelection,
    *,
    direction: str = "image_to_text",
    rows: slice | tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    layout: str = "bhsd",
    reduce_heads: bool = True,
    backend: str = "auto",
    statistics: Sequence[str] = (),
) -> Tensor | AttentionStatistics:
    """The maps of :func:`attention`, computed from the log-sum-exp of any attention: P = exp(scale * q k - lse).

    Args:
        query, key, key_mask, scale, layout, reduce_heads: the arguments of the attention that returned ``lse``.
        lse: natural log-sum-exp of the scaled scores over all keys, float32 ``[B, H, Sq]``. Where it is -inf, as for a
            row without any key, the maps are 0. If None, it is computed for the rows (with "text_to_image", for the
            selected tokens) by a pass over all keys, about half of the arithmetic of attention; its gradient is
            computed by matrix products over ranges of rows.
        direction: "image_to_text": selected tokens are keys and rows are queries, as in :func:`attention`;
            "text_to_image": selected tokens are queries and rows are keys, so a map shows which positions those tokens
            attend to.
        attn_mask: bool ``[B, H, Sq, Sk]``, any of the first three 1, true for the pairs that take part, as for
            ``F.scaled_dot_product_attention``; any strides. ``lse`` must be that of the masked scores. If there is a
            ``key_mask`` too, a pair takes part if both are true.
        rows: the positions with a map (queries, or keys with "text_to_image"); all by default.
        backend: "auto" or "naive".
        statistics: names of further results, with "image_to_text" only: "token_entropy" (the entropy of each row's
            attention to the selected tokens, normalised over them), "token_sums" (the sums of the attention to each
            selected token over the rows), "key_entropy" and "key_sums" (the same for all keys). The weights of the
            selection do not matter to them, and a token that is selected twice counts twice. Those of tokens take as
            long as maps; those of keys take a pass over all pairs of a row and a key.

    Returns:
        float32 ``[B, G, R]``, or ``[B, G, H, R]`` without ``reduce_heads``; differentiable with respect to query, key
        and lse. With ``statistics``, an :class:`AttentionStatistics`, differentiable too.

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
    if lse is not None:
        check_lse(lse, query)
    check_key_mask(key_mask, query, key.shape[2])
    check_attn_mask(attn_mask, query, key.shape[2])
    start, n_rows = resolve_rows(rows, dense.shape[2])
    scale = resolve_scale(scale, query.shape[3])
    check_flag("reduce_heads", reduce_heads)
    if backend not in ("auto", "naive"):
        raise ValueError(f"backend must be auto or naive, got {backend!r}")
    flat = selection.index, constant(selection.weight), key_mask, start, n_rows, scale, reduce_heads, text_to_image
    check_statistics(statistics, STATISTICS, text_to_image)
    reference = backend == "naive" or query.dtype == torch.float64
    if lse is None or statistics:
        arguments = MapArguments(*flat, attn_mask)
        found = maps_and_statistics(query, key, lse, arguments, statistics, reference)
        return found if statistics else found.maps
    if reference:
        return naive.attention_maps(query, key, lse, MapArguments(*flat, attn_mask))
    maps: Tensor = ops.ATTENTION_MAPS(query, key, lse, attn_mask, *flat)
    return maps


def _sequence_axis(layout: str) -> int:
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout must be 'bhsd' or 'bshd', got {layout!r}")
    return 2 if layout == "bhsd" else 1
