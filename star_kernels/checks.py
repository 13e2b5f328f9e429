"""Checks of arguments that all operations share."""

from __future__ import annotations

import sys
import warnings
from operator import itemgetter

import torch
from torch import Tensor

from star_kernels.torch_internals import WATCH

_LIBRARIES = ("star_kernels", "torch", "diffusers")
_LARGEST = 2**63 - 1  # of the integers that PyTorch and the compiled libraries accept


def warn(message: str) -> None:
    """A UserWarning that points to the line outside of libraries from which this code was called."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(
            f"{name} must be a float if it is above 2**63 - 1, got an integer of {value.bit_length()} bits"
        )


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises unless the tensor is strided. Small calls test the condition first, as the call takes longer than it."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        got = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {got}")


def readable(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device; under compilation and torch.func there are none yet."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not WATCH.transformed()


def repeats(tensor: Tensor) -> bool:
    """Whether elements may share memory, as after ``expand`` or in overlapping windows."""
    if tensor.is_contiguous():
        return False
    reach = 1  # the first offset past the elements of the smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), key=itemgetter(0)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False
