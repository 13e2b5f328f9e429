"""Checks of arguments that all operations share."""

from __future__ import annotations

from torch import Tensor


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")


def repeats(tensor: Tensor) -> bool:
    """Whether an element stands for several, as after expand."""
    return any([stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
