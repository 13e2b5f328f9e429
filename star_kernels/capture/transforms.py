"""Captured passes under forward-mode differentiation and the transforms of torch.func."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from star_kernels.checks import warn
from star_kernels.torch_internals import WATCH


def backend_for(name: str, *tensors: Tensor) -> str:
    """The backend of :func:`star_kernels.attention`: "naive" where derivatives are taken that kernels do not have.

    Raises:
        ValueError: a block under torch.vmap, whose maps would have a dimension that is gone when they are read.
    """
    if torch.compiler.is_compiling():
        return "auto"
    if not (WATCH.transformed() or WATCH.dual()):
        return "auto"
    if WATCH.vectorised():
        raise ValueError(f"{name} runs under torch.vmap (jacfwd is made of it): there are no maps of such a pass")
    if not WATCH.transformed() and all(unpack_dual(tensor).tangent is None for tensor in tensors):
        return "auto"
    _warn()
    return "naive"


@cache
def _warn() -> None:
    warn("a captured pass under forward-mode differentiation or torch.func materialises all attention probabilities")
