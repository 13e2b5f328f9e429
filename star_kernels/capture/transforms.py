"""Captured passes under forward-mode differentiation and torch.func transforms."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from star_kernels.checks import warn
from star_kernels.torch_internals import WATCH


def backend_for(name: str, *tensors: Tensor) -> str:
    """The backend of :func:`star_kernels.attention`: "naive" if derivatives are taken that the kernels lack.

    Raises:
        ValueError: the module runs under torch.vmap. Its maps would have a dimension that no longer exists when they
            are read.
    """
    if torch.compiler.is_compiling() or not WATCH.observed():
        return "auto"
    if not (WATCH.transformed() or WATCH.dual()):
        return "auto"
    if WATCH.vectorised():
        raise ValueError(f"{name} runs under torch.vmap (which jacfwd uses too), which maps do not support")
    if not WATCH.transformed() and all(unpack_dual(tensor).tangent is None for tensor in tensors):
        return "auto"
    _warn()
    return "naive"


@cache
def _warn() -> None:
    warn("a captured pass under forward-mode differentiation or torch.func materialises all attention probabilities")
