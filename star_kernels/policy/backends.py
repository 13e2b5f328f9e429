"""Which implementation of the policy operators runs for which tensors."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.checks import warn
from star_kernels.torch_internals import constant_in_graph

BACKENDS = ("auto", "naive", "native", "triton")


@constant_in_graph
def choose_backend(device: str, dtype: torch.dtype) -> str:
    """The backend of "auto": compiled kernels; on a GPU without them Triton; else plain PyTorch, with one warning."""
    if dtype == torch.float64:
        return "naive"
    for backend in ("native", "triton"):
        if not obstacle(backend, device, dtype):
            return backend
    if device == "cuda":
        _warn_naive(f"{obstacle('native', device, dtype)}, and {obstacle('triton', device, dtype)}")
    return "naive"


def resolve_backend(backend: str, model_output: Tensor) -> str:
    """The backend to run for a value of the argument ``backend``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    device, dtype = model_output.device.type, model_output.dtype
    if backend == "auto":
        return choose_backend(device, dtype)
    if problem := obstacle(backend, device, dtype):
        raise ValueError(f"backend {backend!r} cannot run here: {problem}; got {dtype} on {device}")
    return backend


@constant_in_graph
def obstacle(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """What prevents a backend from running on these inputs, or None."""
    if backend == "naive":
        return None
    if dtype == torch.float64:
        return "float64 is not supported"
    if backend == "native":
        return native.problem(device)
    if device != "cuda":
        return "CUDA tensors are required"
    return _triton_problem()


@cache
def _triton_problem() -> str | None:
    return None if find_spec("triton") else "the package triton is not installed"


@cache
def _warn_naive(problem: str) -> None:
    warn(f"star_kernels: the policy loss is falling back to PyTorch (about 30 kernel launches per call): {problem}")
