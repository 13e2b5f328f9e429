"""The attention operators as PyTorch sees them: schema, shapes, autograd."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.attention import maps_gradient, naive, tuning, vendor
from star_kernels.attention.checks import check_like, check_lse, check_operator, maps_shape
from star_kernels.attention.tuning import Plan
from star_kernels.checks import repeats
from star_kernels.operators import Operator

NATIVE_HEAD_DIM = 1024  # csrc/cpu/kernels.h; a longer head takes PyTorch's operations
TRITON = Plan("triton", "triton")
EXPLICIT = {kernel: Plan(kernel, kernel) for kernel in vendor.KERNELS}


_MAPS = "Tensor index, Tensor weight, Tensor? key_mask, SymInt start, SymInt rows, float scale, bool reduce_heads"


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
    if query.is_cuda:
        plan = _plan(backend, query, key, key_mask)
        if plan.forward == "triton":
            from star_kernels.attention import triton_forward

            out, maps, lse = triton_forward.attention(
                query, key, value, index, weight, key_mask, (start, rows), scale, reduce_heads, config=plan.forward_tile
            )
            assert maps is not None  # only a call without a selection has none
            return out, maps, lse
        if plan.forward == "cudnn" and min(query.size(2), key.size(2)) == 1:
            raise ValueError("backend 'cudnn' cannot run here: it takes two queries and two keys at least")
        q, k, v = _aligned(query, key, value)
        out, lse = vendor.cuda_forward(plan.forward, q, k, v, scale)
        out, lse = _laid_out(out, query), lse.contiguous()
        query, key, value = _unit_strides(query, key, value)
    else:
        query, key, value = _for_pytorch(query, key, value)
        out, lse = vendor.forward(query, key, value, key_mask, scale)
    return out, _maps(query, key, lse, index, weight, key_mask, start, rows, scale, reduce_heads, False), lse


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
    query, key, value = _for_pytorch(query, key, value)
    if query.is_cuda:
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    else:
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
    if query.is_cuda:
        plan = _plan(backend, query, key, key_mask)
        if plan.backward != "triton" and grad_out is not None and grad_maps is None and grad_lse is None:
            upstream, q, k, v, out = _aligned(grad_out, query, key, value, out)
            dq, dk, dv = vendor.cuda_backward(plan.backward, upstream, q, k, v, out, lse, scale)
            return _laid_out(dq, query), _laid_out(dk, key), _laid_out(dv, value)
        if tuning.obstacle("triton", query.dtype, query.size(3)) is None:
            from star_kernels.attention import triton_backward

            return triton_backward.attention_backward(
                grad_out, grad_maps, grad_lse, query, key, value, out, lse, index, weight, key_mask,
                (start, rows), scale, reduce_heads, config=plan.backward_config,
            )  # fmt: skip
    query, key, value = _for_pytorch(query, key, value)
    sparse = None
    if grad_maps is not None:
        sparse = maps_gradient.compute(
            grad_maps, query, key, lse, index, weight, key_mask, (start, rows), scale, reduce_heads, False
        )
        grad_lse = sparse.lse if grad_lse is None else grad_lse + sparse.lse
    saved = (grad_out, grad_lse, query, key, value, out, lse)
    if query.is_cuda:  # a key mask always comes with Triton's kernels
        grad_query, grad_key, grad_value = vendor.cuda_float32_backward(*saved, scale)
    else:
        grad_query, grad_key, grad_value = vendor.backward(*saved, key_mask, scale)
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
    query, key, value = _for_pytorch(query, key, value)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def attention_maps(query: Tensor, key: Tensor, *arguments: Any) -> Tensor:
    query, key = _unit_strides(query, key)
    return _maps(query, key, *arguments)


def _maps(
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
    """The maps of tensors with unit strides, by the compiled kernel where there is one."""
    if query.is_cuda and tuning.triton_problem() is None:
        from star_kernels.attention import triton_maps

        return triton_maps.attention_maps(
            query, key, lse, index, weight, key_mask, (start, rows), scale, reduce_heads, text_to_image
        )
    library = native.cpu() if query.is_cpu and query.size(3) <= NATIVE_HEAD_DIM else None
    if library is None:
        return naive.attention_maps(
            query, key, lse, index, weight, key_mask, (start, rows), scale, reduce_heads, text_to_image
        )
    maps = _empty_maps(query, weight, rows, reduce_heads)
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    index, weight = index.contiguous(), weight.contiguous()
    library.attention_maps(
        query, key, lse, index, weight, key_mask, start, scale, text_to_image, reduce_heads, native.threads(), maps
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


def _plan(backend: str, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Plan:
    """The kernels of a call on a GPU."""
    if backend == "triton" or key_mask is not None:
        return TRITON
    dtype, head_dim, queries, keys = query.dtype, query.size(3), query.size(2), key.size(2)
    if backend in vendor.KERNELS:
        chosen = EXPLICIT[backend]
    else:
        chosen = tuning.plan(query.device, dtype, head_dim, queries, keys)
        if backend == "vendor":
            capability = torch.cuda.get_device_capability(query.device)
            chosen = tuning.vendor_plan(chosen, dtype, head_dim, capability, vendor.flash_implementation())
        if min(queries, keys) == 1:
            chosen = _without_cudnn(chosen)
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return _repeatable(chosen) if tuning.obstacle("triton", dtype, head_dim) is None else chosen
    return chosen


@cache
def _without_cudnn(chosen: Plan) -> Plan:
    """The plan for a single query or key, which cuDNN does not take."""
    forward, backward = ("efficient" if k == "cudnn" else k for k in (chosen.forward, chosen.backward))
    return replace(chosen, forward=forward, backward=backward)


@cache
def _repeatable(chosen: Plan) -> Plan:
    """The plan with the backward pass whose results repeat to the bit."""
    return replace(chosen, backward="triton")


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where a row of theirs does not begin at a multiple of 16 bytes or stands for several."""
    return tuple([t if _is_aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors])


def _is_aligned(tensor: Tensor) -> bool:
    step = 16 // tensor.element_size()
    outer = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    steps_well = all([size == 1 or (stride > 0 and stride % step == 0) for size, stride in outer])
    return tensor.stride(-1) == 1 and steps_well and tensor.data_ptr() % 16 == 0


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    """The result in the memory layout that the operator's fake implementation promises, that of ``like``."""
    if result.stride() == like.stride():  # so like is dense too, and its own layout is the promised one
        return result
    (like,) = _unit_strides(like)
    expected = torch.empty_like(like, device="meta")
    return result if result.stride() == expected.stride() else torch.empty_like(like).copy_(result)


def _unit_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where their last dimension is not contiguous."""
    if all([t.stride(-1) == 1 for t in tensors]):
        return tensors
    return tuple([t if t.stride(-1) == 1 else t.contiguous() for t in tensors])


def _for_pytorch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as PyTorch's own kernels take them: its CPU kernel lays results out like the query, and writes them
    wrongly where the query's rows or heads share memory."""
    if not tensors[0].is_cuda:
        tensors = tuple([t.contiguous() if repeats(t) else t for t in tensors])
    return _unit_strides(*tensors)


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """The gradient in the dtype and memory layout of its tensor."""
    return torch.empty_like(tensor).copy_(gradient)


def _empty_maps(query: Tensor, weight: Tensor, rows: int, reduce_heads: bool) -> Tensor:
    return torch.empty(maps_shape(query, weight, rows, reduce_heads), dtype=torch.float32, device=query.device)


def _check_attention(*arguments: Any) -> None:
    check_operator(*arguments[:8])


def _check_attention_backward(
    grad_out: Tensor | None, grad_maps: Tensor | None, grad_lse: Tensor | None, *arguments: Any
) -> None:
    query, key, value, out, lse, index, weight, key_mask, start, rows, _, reduce_heads, _ = arguments
    check_operator(query, key, value, index, weight, key_mask, start, rows)
    check_lse(lse, query)
    check_like("out", out, query.shape, query.dtype, query)
    check_like("grad_out", grad_out, query.shape, query.dtype, query)
    check_like("grad_maps", grad_maps, maps_shape(query, weight, rows, reduce_heads), torch.float32, query)
    check_like("grad_lse", grad_lse, lse.shape, torch.float32, query)


def _check_maps(query: Tensor, key: Tensor, lse: Tensor, *arguments: Any) -> None:
    check_operator(query, key, key, *arguments[:5], text_to_image=arguments[-1])
    check_lse(lse, query)


def _check_maps_backward(grad_maps: Tensor, query: Tensor, key: Tensor, lse: Tensor, *arguments: Any) -> None:
    _check_maps(query, key, lse, *arguments)
    _, weight, _, _, rows, _, reduce_heads, _ = arguments
    check_like("grad_maps", grad_maps, maps_shape(query, weight, rows, reduce_heads), torch.float32, query)


# Backward operators come first: the forward ones name them.
ATTENTION_BACKWARD = Operator(
    "attention_backward(Tensor? grad_out, Tensor? grad_maps, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor lse, {_MAPS}, str backend) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    attention_backward,
    attention_backward_fake,
    check=_check_attention_backward,
)
ATTENTION = Operator(
    f"attention(Tensor query, Tensor key, Tensor value, {_MAPS}, str backend) -> (Tensor out, Tensor maps, Tensor lse)",
    attention,
    attention_fake,
    check=_check_attention,
    setup_context=_save_attention,
    backward=_differentiate_attention,
)
ATTENTION_MAPS_BACKWARD = Operator(
    f"attention_maps_backward(Tensor grad_maps, Tensor query, Tensor key, Tensor lse, {_MAPS}, bool text_to_image) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_lse)",
    attention_maps_backward,
    attention_maps_backward_fake,
    check=_check_maps_backward,
)
ATTENTION_MAPS = Operator(
    f"attention_maps(Tensor query, Tensor key, Tensor lse, {_MAPS}, bool text_to_image) -> Tensor",
    attention_maps,
    attention_maps_fake,
    check=_check_maps,
    setup_context=_save_maps,
    backward=_differentiate_maps,
)
