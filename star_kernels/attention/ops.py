"""The attention operators as registered with PyTorch: schema, implementation, shapes, gradient and checks.

Their schemas are flat; the implementations collect the arguments of the maps in a :class:`MapArguments`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.attention import dispatch, hopper, maps_gradient, naive, vendor
from star_kernels.attention.arguments import SCHEMA, MapArguments
from star_kernels.attention.checks import check_like, check_lse, check_operator
from star_kernels.attention.layouts import aligned, for_pytorch, gradient_like, laid_out, unit_strides
from star_kernels.attention.masks import expanded
from star_kernels.operators import Operator


def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments, backend = MapArguments(*rest[:-1]), rest[-1]
    key_mask, scale = arguments.key_mask, arguments.scale
    if query.is_cuda:
        plan = dispatch.plan_of_call(backend, query, key, key_mask)
        if plan.forward == "triton":
            from star_kernels.attention import triton_forward

            out, maps, lse = triton_forward.attention(query, key, value, arguments, config=plan.forward_tile)
            assert maps is not None
            return out, maps, lse
        if plan.forward == "hopper":
            out, maps, lse = hopper.attention(query, key, value, arguments)
            assert maps is not None
            return out, maps, lse
        q, k, v = aligned(query, key, value)
        out, lse = vendor.cuda_forward(plan.forward, q, k, v, scale)
        out, lse = laid_out(out, query), lse.contiguous()
        query, key = unit_strides(query, key)
    else:
        query, key, value = for_pytorch(query, key, value)
        out, lse = vendor.forward(query, key, value, key_mask, scale)
    return out, maps_of(query, key, lse, arguments), lse


def attention_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = MapArguments(*rest[:-1])
    query, key, value = for_pytorch(query, key, value)
    if query.is_cuda:
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    else:
        out, lse = vendor.forward(query, key, value, arguments.key_mask, arguments.scale)
    return out, _empty_maps(query, arguments), lse


def attention_backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments, backend = MapArguments(*rest[:-1]), rest[-1]
    key_mask, scale = arguments.key_mask, arguments.scale
    if query.is_cuda:
        plan = dispatch.plan_of_call(backend, query, key, key_mask)
        if plan.backward != "triton" and grad_out is not None and grad_maps is None and grad_lse is None:
            upstream, q, k, v, out = aligned(grad_out, query, key, value, out)
            dq, dk, dv = vendor.cuda_backward(plan.backward, upstream, q, k, v, out, lse, scale)
            return laid_out(dq, query), laid_out(dk, key), laid_out(dv, value)
        if dispatch.kernel_obstacle("triton", query.dtype, query.size(3)) is None:
            from star_kernels.attention import triton_backward

            return triton_backward.attention_backward(
                grad_out, grad_maps, grad_lse, query, key, value, out, lse, arguments, config=plan.backward_config
            )
    query, key, value = for_pytorch(query, key, value)
    sparse = None
    if grad_maps is not None:
        sparse = maps_gradient.compute(grad_maps, query, key, lse, arguments)
        grad_lse = sparse.lse if grad_lse is None else grad_lse + sparse.lse
    saved = (grad_out, grad_lse, query, key, value, out, lse)
    if query.is_cuda:  # a call with a key mask has returned above, through the Triton kernels
        grad_query, grad_key, grad_value = vendor.cuda_float32_backward(*saved, scale)
    else:
        grad_query, grad_key, grad_value = vendor.backward(*saved, key_mask, scale)
    if sparse is not None:
        sparse.add_to(grad_query, grad_key)
    return gradient_like(grad_query, query), gradient_like(grad_key, key), gradient_like(grad_value, value)


def attention_backward_fake(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = for_pytorch(query, key, value)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def attention_maps(query: Tensor, key: Tensor, lse: Tensor, attn_mask: Tensor | None, *rest: Any) -> Tensor:
    query, key = unit_strides(query, key)
    return maps_of(query, key, lse, MapArguments(*rest)._replace(attn_mask=attn_mask))


def attention_maps_fake(query: Tensor, key: Tensor, lse: Tensor, attn_mask: Tensor | None, *rest: Any) -> Tensor:
    return _empty_maps(query, MapArguments(*rest))


def attention_maps_backward(
    grad_maps: Tensor, query: Tensor, key: Tensor, lse: Tensor, attn_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    sparse = maps_gradient.compute(grad_maps, query, key, lse, MapArguments(*rest)._replace(attn_mask=attn_mask))
    grad_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    sparse.add_to(grad_query, grad_key)
    return gradient_like(grad_query, query), gradient_like(grad_key, key), sparse.lse


def attention_maps_backward_fake(
    grad_maps: Tensor, query: Tensor, key: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), lse.new_empty(lse.shape)


def maps_of(query: Tensor, key: Tensor, lse: Tensor, arguments: MapArguments) -> Tensor:
    """The maps of tensors with unit strides, from their log-sum-exp."""
    kernel = dispatch.maps_kernel(query)
    if kernel == "naive":
        return naive.attention_maps(query, key, lse, arguments)
    if kernel == "triton":
        from star_kernels.attention import triton_maps

        return triton_maps.attention_maps(query, key, lse, arguments)
    index, weight, key_mask, start, _, scale, reduce_heads, text_to_image, attn_mask = arguments
    maps = _empty_maps(query, arguments)
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    index, weight = index.contiguous(), weight.contiguous()
    library: Any = native.cpu()
    given = (index, weight, key_mask, start, scale, text_to_image, reduce_heads, native.threads(), maps)
    if attn_mask is None:
        library.attention_maps(query, key, lse, *given)
    else:
        library.masked_attention_maps(query, key, lse, expanded(attn_mask, query, key.shape[2]), *given)
    return maps


def _empty_maps(query: Tensor, arguments: MapArguments) -> Tensor:
    return query.new_empty(arguments.shape(query.shape[1]), dtype=torch.float32)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, index, weight, key_mask, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, output[0], output[2], index, weight, key_mask)
    ctx.set_materialize_grads(False)


def _differentiate_attention(
    ctx: Any, grad_out: Tensor | None, grad_maps: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_maps is None and grad_lse is None:
        return (None,) * 11
    grads = ATTENTION_BACKWARD(grad_out, grad_maps, grad_lse, *ctx.saved_tensors, *ctx.options)
    return (*grads, *(None,) * 8)


def _save_maps(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, lse, attn_mask, index, weight, key_mask, *ctx.options = inputs
    ctx.save_for_backward(query, key, lse, attn_mask, index, weight, key_mask)


def _differentiate_maps(ctx: Any, grad_maps: Tensor) -> tuple[Tensor | None, ...]:
    grads = ATTENTION_MAPS_BACKWARD(grad_maps, *ctx.saved_tensors, *ctx.options)
    return (*grads, *(None,) * 9)


def _check_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    check_operator(query, key, value, MapArguments(*rest[:-1]))


def _check_attention_backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> None:
    arguments = MapArguments(*rest[:-1])
    check_operator(query, key, value, arguments)
    check_lse(lse, query)
    check_like("out", out, query.shape, query.dtype, query)
    check_like("grad_out", grad_out, query.shape, query.dtype, query)
    check_like("grad_maps", grad_maps, arguments.shape(query.shape[1]), torch.float32, query)
    check_like("grad_lse", grad_lse, lse.shape, torch.float32, query)


def _check_maps(query: Tensor, key: Tensor, lse: Tensor, attn_mask: Tensor | None, *rest: Any) -> None:
    check_operator(query, key, key, MapArguments(*rest)._replace(attn_mask=attn_mask))
    check_lse(lse, query)


def _check_maps_backward(
    grad_maps: Tensor, query: Tensor, key: Tensor, lse: Tensor, attn_mask: Tensor | None, *rest: Any
) -> None:
    _check_maps(query, key, lse, attn_mask, *rest)
    check_like("grad_maps", grad_maps, MapArguments(*rest).shape(query.shape[1]), torch.float32, query)


# Backward operators come first: the gradients of the forward operators refer to them.
ATTENTION_BACKWARD = Operator(
    "attention_backward(Tensor? grad_out, Tensor? grad_maps, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor lse, {SCHEMA}, str backend) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    attention_backward,
    attention_backward_fake,
    check=_check_attention_backward,
)
ATTENTION = Operator(
    f"attention(Tensor query, Tensor key, Tensor value, {SCHEMA}, str backend) "
    "-> (Tensor out, Tensor maps, Tensor lse)",
    attention,
    attention_fake,
    check=_check_attention,
    setup_context=_save_attention,
    backward=_differentiate_attention,
)
ATTENTION_MAPS_BACKWARD = Operator(
    "attention_maps_backward(Tensor grad_maps, Tensor query, Tensor key, Tensor lse, Tensor? attn_mask, "
    f"{SCHEMA}, bool text_to_image) -> (Tensor grad_query, Tensor grad_key, Tensor grad_lse)",
    attention_maps_backward,
    attention_maps_backward_fake,
    check=_check_maps_backward,
)
ATTENTION_MAPS = Operator(
    f"attention_maps(Tensor query, Tensor key, Tensor lse, Tensor? attn_mask, {SCHEMA}, bool text_to_image) -> Tensor",
    attention_maps,
    attention_maps_fake,
    check=_check_maps,
    setup_context=_save_maps,
    backward=_differentiate_maps,
)
