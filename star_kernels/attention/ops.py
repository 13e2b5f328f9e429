"""The attention operators as PyTorch sees them: schema, shapes, autograd. Arguments are validated by the callers.

``Library.define`` and ``impl`` rather than the ``custom_op`` decorator: a call costs two microseconds instead of tens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.attention import maps_gradient, naive, vendor

_library = torch.library.Library("star_kernels", "FRAGMENT")

_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor index, Tensor weight, Tensor? key_mask, int start, "
    "int rows, float scale, bool reduce_heads, str backend) -> (Tensor out, Tensor maps, Tensor lse)"
)
_library.define(
    "attention_backward(Tensor? grad_out, Tensor? grad_maps, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor out, Tensor lse, Tensor index, Tensor weight, Tensor? key_mask, int start, int rows, float scale, "
    "bool reduce_heads, str backend) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)
_library.define(
    "attention_maps(Tensor query, Tensor key, Tensor lse, Tensor index, Tensor weight, Tensor? key_mask, int start, "
    "int rows, float scale, bool reduce_heads, bool text_to_image) -> Tensor"
)
_library.define(
    "attention_maps_backward(Tensor grad_maps, Tensor query, Tensor key, Tensor lse, Tensor index, Tensor weight, "
    "Tensor? key_mask, int start, int rows, float scale, bool reduce_heads, bool text_to_image) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_lse)"
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    weight: Tensor,
    key_mask: Tensor | None,
    start: int,
    rows: int,
    scale: float,
    reduce_heads: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_unit_stride(t) for t in (query, key, value))
    out, lse = vendor.forward(query, key, value, key_mask, scale)
    return out, attention_maps(query, key, lse, index, weight, key_mask, start, rows, scale, reduce_heads, False), lse


def attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    weight: Tensor,
    key_mask: Tensor | None,
    start: int,
    rows: int,
    scale: float,
    reduce_heads: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_unit_stride(t) for t in (query, key, value))
    out, lse = vendor.forward(query, key, value, key_mask, scale)
    return out, _empty_maps(query, weight, rows, reduce_heads), lse


def attention_backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    weight: Tensor,
    key_mask: Tensor | None,
    start: int,
    rows: int,
    scale: float,
    reduce_heads: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_unit_stride(t) for t in (query, key, value))
    sparse = None
    if grad_maps is not None:
        sparse = maps_gradient.compute(
            grad_maps, query, key, lse, index, weight, key_mask, (start, rows), scale, reduce_heads, False
        )
        grad_lse = sparse.lse if grad_lse is None else grad_lse + sparse.lse
    grad_query, grad_key, grad_value = vendor.backward(grad_out, grad_lse, query, key, value, out, lse, key_mask, scale)
    if sparse is not None:
        sparse.add_to(grad_query, grad_key)
    return _like(grad_query, query), _like(grad_key, key), _like(grad_value, value)


def attention_backward_fake(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_unit_stride(t) for t in (query, key, value))
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def attention_maps(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    index: Tensor,
    weight: Tensor,
    key_mask: Tensor | None,
    start: int,
    rows: int,
    scale: float,
    reduce_heads: bool,
    text_to_image: bool,
) -> Tensor:
    library = native.cpu() if query.device.type == "cpu" else None
    if library is None:
        return naive.attention_maps(
            query, key, lse, index, weight, key_mask, (start, rows), scale, reduce_heads, text_to_image
        )
    maps = _empty_maps(query, weight, rows, reduce_heads)
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    library.attention_maps(
        _unit_stride(query),
        _unit_stride(key),
        lse,
        index.contiguous(),
        weight.contiguous(),
        key_mask,
        start,
        scale,
        text_to_image,
        reduce_heads,
        native.threads(),
        maps,
    )
    return maps


def attention_maps_fake(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    index: Tensor,
    weight: Tensor,
    key_mask: Tensor | None,
    start: int,
    rows: int,
    scale: float,
    reduce_heads: bool,
    text_to_image: bool,
) -> Tensor:
    return _empty_maps(query, weight, rows, reduce_heads)


def attention_maps_backward(
    grad_maps: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    index: Tensor,
    weight: Tensor,
    key_mask: Tensor | None,
    start: int,
    rows: int,
    scale: float,
    reduce_heads: bool,
    text_to_image: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sparse = maps_gradient.compute(
        grad_maps, query, key, lse, index, weight, key_mask, (start, rows), scale, reduce_heads, text_to_image
    )
    grad_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    sparse.add_to(grad_query, grad_key)
    return _like(grad_query, query), _like(grad_key, key), sparse.lse


def attention_maps_backward_fake(
    grad_maps: Tensor, query: Tensor, key: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), lse.new_empty(lse.shape)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, index, weight, key_mask, *ctx.arguments = inputs
    ctx.save_for_backward(query, key, value, output[0], output[2], index, weight, key_mask)
    ctx.set_materialize_grads(False)


def _differentiate_attention(
    ctx: Any, grad_out: Tensor | None, grad_maps: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_maps is None and grad_lse is None:
        return (None,) * 11
    grads = ATTENTION_BACKWARD(grad_out, grad_maps, grad_lse, *ctx.saved_tensors, *ctx.arguments)
    return (*grads, *(None,) * 8)


def _save_maps(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.start, ctx.rows, ctx.scale, ctx.reduce_heads, ctx.text_to_image = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_maps(ctx: Any, grad_maps: Tensor) -> tuple[Tensor | None, ...]:
    grads = ATTENTION_MAPS_BACKWARD(
        grad_maps, *ctx.saved_tensors, ctx.start, ctx.rows, ctx.scale, ctx.reduce_heads, ctx.text_to_image
    )
    return (*grads, *(None,) * 8)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """The gradient in the dtype and memory layout of its tensor."""
    return torch.empty_like(tensor).copy_(gradient)


def _empty_maps(query: Tensor, weight: Tensor, rows: int, reduce_heads: bool) -> Tensor:
    batch, groups = weight.shape[:2]
    shape = (batch, groups, rows) if reduce_heads else (batch, groups, query.shape[1], rows)
    return query.new_empty(shape, dtype=torch.float32)


for _name, _function, _shapes in (
    ("attention", attention, attention_fake),
    ("attention_backward", attention_backward, attention_backward_fake),
    ("attention_maps", attention_maps, attention_maps_fake),
    ("attention_maps_backward", attention_maps_backward, attention_maps_backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"star_kernels::{_name}", _shapes, lib=_library)

torch.library.register_autograd(
    "star_kernels::attention", _differentiate_attention, setup_context=_save_attention, lib=_library
)
torch.library.register_autograd(
    "star_kernels::attention_maps", _differentiate_maps, setup_context=_save_maps, lib=_library
)

# The overloads themselves: a call need not look for them.
ATTENTION = torch.ops.star_kernels.attention.default
ATTENTION_BACKWARD = torch.ops.star_kernels.attention_backward.default
ATTENTION_MAPS = torch.ops.star_kernels.attention_maps.default
ATTENTION_MAPS_BACKWARD = torch.ops.star_kernels.attention_maps_backward.default
