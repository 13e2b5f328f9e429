"""Which kernels compute attention, and what prevents a backend or a kernel from computing it.

On a GPU the kernels of a call come from a table of measurements (:mod:`star_kernels.attention.tuning`). Without an
entry for the call:

* 16 bits, head dimension up to 64: Triton, forward and backward; but on Hopper cuDNN backward, which took 0.91 to 0.97
  of the time of Triton on an H200.
* 16 bits, larger heads, on Hopper and on Blackwell's sm_100 family: flash if the user has activated FA3 or FA4,
  otherwise cuDNN from 9.15.1 on, forward and backward. Both are measured by others at 1.6 times the speed of a Triton
  kernel there (head dimension 128).
* 16 bits, larger heads, on other GPUs from sm_80 on: flash, forward and backward.
* float32: the efficient kernel, forward and backward; Triton took 3.7 and 6.5 times as long on an H200.
* The kernel for Hopper (backend "hopper") if a table names it; not otherwise, as it has not been measured yet.
* Head dimensions above the limit of Triton: the first of PyTorch's kernels that supports them.

Gradients of the maps or of the log-sum-exp, and key masks, require the Triton kernels: PyTorch's support neither.
Without Triton those gradients are computed by the efficient kernel in float32, and maps from the log-sum-exp in plain
PyTorch. ``torch.use_deterministic_algorithms(True)`` selects Triton's backward pass too, which repeats bit for bit.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.attention import hopper, tuning, vendor
from star_kernels.attention.tuning import Plan
from star_kernels.checks import warn
from star_kernels.torch_internals import constant_in_graph

BACKENDS = ("auto", "naive", "triton", "hopper", "vendor", *vendor.KERNELS)
TRITON_HEAD_DIM = 128
STATISTICS_HEAD_DIM = 256  # of the Triton kernels for statistics
NATIVE_HEAD_DIM = 1024  # kMaxHeadDim of csrc/cpu/kernels.h
TRITON = Plan("triton", "triton")
EXPLICIT = {kernel: Plan(kernel, kernel) for kernel in vendor.KERNELS}


@constant_in_graph
def choose_backend(device: str, dtype: torch.dtype, head_dim: int, masked: bool = False) -> str:
    """The backend that "auto" selects; on a GPU "auto" again, as the operator's choice depends on the lengths.

    Warns once if a GPU has to run the reference implementation.
    """
    if dtype == torch.float64:
        return "naive"
    if device == "cpu":
        return "vendor"
    problem = obstacle("auto", device, dtype, head_dim, masked)
    if problem is None:
        return "auto"
    _warn_naive(f"{problem}; got {dtype}, head dimension {head_dim}{', a key_mask' if masked else ''}, on {device}")
    return "naive"


@cache
def _warn_naive(problem: str) -> None:
    warn(
        "star_kernels.attention is falling back to backend='naive', which materialises all probabilities: no other "
        f"backend can run here: {problem}"
    )


@constant_in_graph
def obstacle(backend: str, device: str, dtype: torch.dtype, head_dim: int, masked: bool = False) -> str | None:
    """What prevents a backend from running on these inputs, or None."""
    if backend == "naive":
        return None
    if dtype == torch.float64:
        return "float64 is not supported"
    if backend == "vendor" and device == "cpu":
        return None
    if device != "cuda":
        return "CUDA tensors are required"
    if masked and backend not in ("auto", "triton", "hopper"):
        return "key_mask is not supported on CUDA"
    if backend in ("triton", "hopper", *vendor.KERNELS) or masked:
        return kernel_obstacle("triton" if backend == "auto" else backend, dtype, head_dim)
    first = None
    for kernel in ("triton", *vendor.KERNELS)[backend == "vendor" :]:
        if (problem := kernel_obstacle(kernel, dtype, head_dim)) is None:
            return None
        first = first or problem
    return first


def kernel_obstacle(kernel: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """What prevents a CUDA kernel from running on these inputs, or None.

    Args:
        kernel: "triton", "hopper" or one of ``vendor.KERNELS``.
    """
    if kernel == "triton":
        if head_dim > TRITON_HEAD_DIM:
            return f"the head dimension must be at most {TRITON_HEAD_DIM}"
        return triton_problem()
    if kernel == "hopper":
        return hopper_problem(dtype, head_dim)
    narrow = dtype in (torch.float16, torch.bfloat16)
    if kernel != "efficient" and not narrow:
        return "float16 or bfloat16 is required"
    multiple = 8 if narrow else 4
    if head_dim % multiple:
        return f"the head dimension must be a multiple of {multiple}"
    largest = {"cudnn": 128, "flash": 256, "efficient": 65536}[kernel]
    if head_dim > largest:
        return f"the head dimension must be at most {largest}"
    return cudnn_problem() if kernel == "cudnn" else None


@cache
def triton_problem() -> str | None:
    """What prevents the Triton kernels from running, or None."""
    return None if find_spec("triton") else "the package triton is not installed"


@cache
def hopper_problem(dtype: torch.dtype, head_dim: int) -> str | None:
    """What prevents the kernel for Hopper from running on the current GPU, or None.

    It requires Triton for the mean of the maps over heads and for gradients with a key mask.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return hopper.obstacle(dtype, head_dim, capability) or triton_problem()


@cache
def cudnn_problem() -> str | None:
    """What prevents the use of the installed cuDNN, or None.

    Before 9.15.1 its attention is wrong at lengths that are not multiples of 128; PyTorch avoids it too (#169849).
    """
    version = torch.backends.cudnn.version()
    if version is not None and version <= 91500:
        return f"cuDNN before 9.15.1 gives wrong results at some lengths, and this PyTorch has cuDNN {version}"
    if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1":
        return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 changes the layout of the log-sum-exp"
    return None


def maps_kernel(query: Tensor) -> str:
    """The kernel for maps from a log-sum-exp: "triton", "native", or "naive", the reference implementation."""
    if query.is_cuda:
        return "triton" if triton_problem() is None else "naive"
    if query.is_cpu and query.shape[3] <= NATIVE_HEAD_DIM and native.cpu() is not None:
        return "native"
    return "naive"


def statistics_kernel(query: Tensor) -> str:
    """The kernel for statistics of all pairs: "triton", "native", or "naive", the reference in ranges of rows."""
    kernel = maps_kernel(query)
    return "naive" if kernel == "triton" and query.shape[3] > STATISTICS_HEAD_DIM else kernel


def plan_of_call(backend: str, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Plan:
    """The kernels of a call on a GPU.

    Raises:
        ValueError: the backend does not support the lengths.
    """
    if backend == "triton" or (key_mask is not None and backend != "hopper"):
        return TRITON
    dtype, head_dim, queries, keys = query.dtype, query.size(3), query.size(2), key.size(2)
    if backend == "hopper":
        without = TRITON if key_mask is not None else plan(query.device, dtype, head_dim, queries, keys)
        chosen = _with_hopper(without)
        if min(queries, keys) == 1:
            chosen = _without_cudnn(chosen)
    elif backend in vendor.KERNELS:
        if backend == "cudnn" and min(queries, keys) == 1:
            raise ValueError(
                "backend 'cudnn' cannot run here: at least two queries and two keys are required; got "
                f"{queries} and {keys}"
            )
        chosen = EXPLICIT[backend]
    else:
        chosen = plan(query.device, dtype, head_dim, queries, keys)
        if backend == "vendor":
            capability = torch.cuda.get_device_capability(query.device)
            chosen = vendor_plan(chosen, dtype, head_dim, capability, vendor.flash_implementation())
        if min(queries, keys) == 1:
            chosen = _without_cudnn(chosen)
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return _repeatable(chosen) if kernel_obstacle("triton", dtype, head_dim) is None else chosen
    return chosen


def plan(device: torch.device, dtype: torch.dtype, head_dim: int, queries: int, keys: int) -> Plan:
    """The kernels for unmasked attention of this kind on a CUDA device."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _plan(index, dtype, head_dim, tuning.size_class(queries, keys), vendor.flash_implementation())


@cache
def _plan(index: int, dtype: torch.dtype, head_dim: int, size: int, flash: str) -> Plan:
    def can_run(kernel: str) -> bool:
        return kernel_obstacle(kernel, dtype, head_dim) is None

    found = tuning.find(tuning.table(torch.cuda.get_device_name(index)), dtype, head_dim, size, flash, can_run)
    if found is not None:
        return found
    return default_plan(dtype, head_dim, torch.cuda.get_device_capability(index), flash)


def default_plan(dtype: torch.dtype, head_dim: int, capability: tuple[int, int], flash: str = "FA2") -> Plan:
    """The kernels for a call without an entry in a table: see the head of this file."""
    vendors = _by_speed(capability, flash)
    wanted = ("triton", *vendors) if dtype != torch.float32 and head_dim <= 64 else (*vendors, "triton")
    kernel = next((k for k in wanted if kernel_obstacle(k, dtype, head_dim) is None), "triton")
    if kernel == "triton" and capability[0] == 9 and kernel_obstacle("cudnn", dtype, head_dim) is None:
        return Plan(kernel, "cudnn")
    return Plan(kernel, _with_backward(kernel, head_dim, capability))


@cache
def vendor_plan(chosen: Plan, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], flash: str) -> Plan:
    """The plan with PyTorch's kernels only: the chosen ones, or the fastest that supports the inputs."""
    supported = [k for k in _by_speed(capability, flash) if kernel_obstacle(k, dtype, head_dim) is None]
    first = supported[0] if supported else "triton"
    forward, backward = (k if k in supported else first for k in (chosen.forward, chosen.backward))
    return Plan(forward, _with_backward(backward, head_dim, capability))


def _by_speed(capability: tuple[int, int], flash: str) -> tuple[str, ...]:
    if capability < (8, 0):  # the other kernels require sm_80
        return ("efficient",)
    if capability[0] not in (9, 10):  # PyTorch itself prefers cuDNN only on these
        return ("flash", "efficient")
    return ("cudnn", "flash", "efficient") if flash == "FA2" else ("flash", "cudnn", "efficient")


def _with_backward(kernel: str, head_dim: int, capability: tuple[int, int]) -> str:
    """The kernel, or the efficient one for heads whose backward pass flash lacks on sm_86, sm_89 and sm_120."""
    missing = kernel == "flash" and head_dim > 192 and capability not in ((8, 0), (9, 0), (10, 0), (10, 3))
    return "efficient" if missing else kernel


@cache
def _with_hopper(chosen: Plan) -> Plan:
    """The plan with the forward kernel for Hopper."""
    return replace(chosen, forward="hopper", forward_tile=None)


@cache
def _without_cudnn(chosen: Plan) -> Plan:
    """The plan for a single query or a single key, which cuDNN does not support."""
    forward, backward = ("efficient" if k == "cudnn" else k for k in (chosen.forward, chosen.backward))
    return replace(chosen, forward=forward, backward=backward)


@cache
def _repeatable(chosen: Plan) -> Plan:
    """The plan with the backward pass whose results repeat bit for bit."""
    return replace(chosen, backward="triton")
