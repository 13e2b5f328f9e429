"""Checks of arguments that all operations share."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.operators import WATCH


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_dense(name: str, tensor: Tensor) -> None:
    """A tensor whose elements lie in memory, at strides."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        got = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {got}")


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at: not those of a GPU, which would be waited for, nor in a graph that is compiled
    or under a transform of torch.func, where there are none yet."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not WATCH.transformed()


def repeats(tensor: Tensor) -> bool:
    """Whether an element stands for several, as after expand."""
    return any([stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
