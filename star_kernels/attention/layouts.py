"""Memory layouts: those that the kernels accept, and those that the operators promise for their results."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.checks import repeats


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied if a row does not start at a multiple of 16 bytes or if rows share memory."""
    return tuple([t if is_aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors])


def is_aligned(tensor: Tensor) -> bool:
    step = 16 // tensor.element_size()
    outer = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    outer_aligned = all([size == 1 or (stride > 0 and stride % step == 0) for size, stride in outer])
    return tensor.stride(-1) == 1 and outer_aligned and tensor.data_ptr() % 16 == 0


def unit_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied if their last dimension is not contiguous."""
    if all([t.stride(-1) == 1 for t in tensors]):
        return tensors
    return tuple([t if t.stride(-1) == 1 else t.contiguous() for t in tensors])


def for_pytorch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in layouts that PyTorch's own kernels accept.

    Its CPU kernel returns results in the layout of the query, and writes them incorrectly if rows or heads of the query
    share memory.
    """
    if all([t.is_contiguous() and t.stride(-1) == 1 for t in tensors]):
        return tensors
    if not tensors[0].is_cuda:
        tensors = tuple([t.contiguous() if repeats(t) else t for t in tensors])
    return unit_strides(*tensors)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous rows, which start at multiples of 16 bytes if the head dimension is a multiple of 8.

    The Triton kernels require this layout. All usual layouts meet it; any other is copied, as are rows so far apart
    that offsets within a tile exceed 32 bits.
    """
    sizes, strides = tensor.shape[:-1], tensor.stride()[:-1]
    unit = 8 if tensor.shape[-1] % 8 == 0 else 1
    fits = tensor.stride(-1) == 1 and strides[-1] < 1 << 23 and (unit == 1 or tensor.data_ptr() % 16 == 0)
    if fits and all([n == 1 or s % unit == 0 for n, s in zip(sizes, strides, strict=True)]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def result_like(tensor: Tensor) -> Tensor:
    """An empty tensor in the layout of ``torch.empty_like``, or a contiguous one if that layout has strided rows."""
    if tensor.stride(-1) == 1:
        result = torch.empty_like(tensor)
        if result.stride(-1) == 1:
            return result
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def laid_out(result: Tensor, like: Tensor) -> Tensor:
    """The result in the layout that the operator's fake implementation promises, which is that of ``like``."""
    if result.stride() == like.stride():  # then like is dense too, and the promised layout is its own
        return result
    (like,) = unit_strides(like)
    expected = torch.empty_like(like, device="meta")
    return result if result.stride() == expected.stride() else torch.empty_like(like).copy_(result)


def gradient_like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """The gradient in the dtype and layout of its tensor."""
    if gradient.dtype == tensor.dtype and gradient.stride() == tensor.stride() and tensor.is_contiguous():
        return gradient
    return torch.empty_like(tensor).copy_(gradient)
