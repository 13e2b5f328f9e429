"""The direct path of attention, on which small calls spend little time in Python.

It takes arguments that are valid, and tensors that are plain and in layouts that every kernel reads as they are. The
library for CPUs finds that out from the metadata of all tensors, on any device, in the time of two checks in Python.
Other arguments are checked one by one by :mod:`star_kernels.attention.functional`, and copied where necessary.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.attention import dispatch, ops, vendor
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.checks import autocasted, resolve_rows
from star_kernels.operators import constant
from star_kernels.selection import TokenSelection
from star_kernels.torch_internals import WATCH

_ON_CUDA, _NARROW = 2, 4  # flags of attention_kind in csrc/cpu/exports.cpp: the device, and a dtype of 16 bits
_UNREADABLE = (IndexError, TypeError, ValueError, RuntimeError, BufferError)  # of tensors that have no strides


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: TokenSelection,
    axis: int,
    rows: slice | tuple[int, int] | None,
    key_mask: Tensor | None,
    scale: float | None,
    reduce_heads: bool,
    detach_maps: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Output, maps and log-sum-exp, the output in layout [B, H, S, D]; None if the arguments are not for this path.

    Args:
        axis: the dimension of the sequence.
        reduce_heads, detach_maps: of type bool.
    """
    if type(selection) is not TokenSelection or WATCH.observed():
        return None
    if WATCH.autocasting():
        query, key, value = autocasted(query, key, value)
    index, weight = selection.index, selection.weight
    if not (type(query) is type(key) is type(value) is type(index) is type(weight) is Tensor):
        return None
    if key_mask is not None and (type(key_mask) is not Tensor or key_mask.is_neg()):
        return None
    if query.is_neg() or key.is_neg() or value.is_neg() or index.is_neg() or weight.is_neg():
        return None
    library, _ = native.load(native.CPU)
    if library is None:
        return None
    try:
        shape = query.shape
        start, n_rows = (0, shape[axis]) if rows is None else resolve_rows(rows, shape[axis])
        last = selection.last
        kind = library.attention_kind(query, key, value, index, weight, key_mask, axis, last, start, n_rows)
    except _UNREADABLE:
        return None
    if not kind:
        return None
    if axis == 1:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if scale is None:
        scale = shape[3] ** -0.5
    elif type(scale) is not float or not -inf < scale < inf:
        return None
    differentiated = (query.requires_grad or key.requires_grad or value.requires_grad) and torch.is_grad_enabled()
    if kind & _ON_CUDA:
        arguments = MapArguments(index, constant(weight), key_mask, start, n_rows, scale, reduce_heads)
        return _on_cuda(query, key, value, arguments, backend, differentiated, detach_maps)
    if backend != "auto" and backend != "vendor":
        return None
    # PyTorch's 16-bit backward pass on a CPU takes several times as long as that of our operator.
    if differentiated and not (detach_maps and not kind & _NARROW):
        flat = index, constant(weight), key_mask, start, n_rows, scale, reduce_heads, "vendor"
        out, maps, lse = ops.ATTENTION.differentiable(query, key, value, *flat)
        return (out, maps.detach(), lse.detach()) if detach_maps else (out, maps, lse)
    out, lse = vendor.forward(query, key, value, key_mask, scale)
    batch, phrases, _ = weight.shape
    # With strides given, an allocation takes half the time.
    if reduce_heads:
        maps = lse.new_empty_strided((batch, phrases, n_rows), (phrases * n_rows, n_rows, 1))
    else:
        heads = shape[3 - axis]
        sizes, strides = (batch, phrases, heads, n_rows), (phrases * heads * n_rows, heads * n_rows, n_rows, 1)
        maps = lse.new_empty_strided(sizes, strides)
    threads = torch.get_num_threads()
    library.attention_maps(query, key, lse, index, weight, key_mask, start, scale, False, reduce_heads, threads, maps)
    return out, maps, lse


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: MapArguments,
    backend: str,
    differentiated: bool,
    detach_maps: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    kind = ("cuda", query.dtype, query.shape[3], arguments.key_mask is not None)
    if backend == "auto":
        backend = dispatch.choose_backend(*kind)
    elif backend not in dispatch.BACKENDS or dispatch.obstacle(backend, *kind) is not None:
        return None
    if backend == "naive":
        return None
    if not differentiated:
        return ops.attention(query, key, value, *arguments.of_attention, backend)
    if detach_maps:
        plan = dispatch.plan_of_call(backend, query, key, arguments.key_mask)
        if plan.forward == plan.backward and plan.forward in vendor.KERNELS:
            out, lse = vendor.cuda_forward(plan.forward, query, key, value, arguments.scale)
            lse = lse.detach().contiguous()
            return out, ops.maps_of(query.detach(), key.detach(), lse, arguments), lse
    out, maps, lse = ops.ATTENTION.differentiable(query, key, value, *arguments.of_attention, backend)
    return (out, maps.detach(), lse.detach()) if detach_maps else (out, maps, lse)
