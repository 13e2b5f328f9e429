"""Loads the compiled libraries of csrc/, once, when they are first needed.

The environment variable STAR_KERNELS_LIB names a folder to load them from instead of ``star_kernels/lib``: a build with
sanitizers, for example, or one to compare with.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from star_kernels.checks import warn
from star_kernels.torch_internals import constant_in_graph

FOLDER = Path(os.environ.get("STAR_KERNELS_LIB") or Path(__file__).with_name("lib"))
CPU = "libstar_kernels_cpu.so"
_POLICY = ("policy_forward", "policy_backward", "nft_forward", "nft_backward", "sample_transition")
FUNCTIONS = {
    CPU: (
        *_POLICY,
        "attention_kind",
        "attention_maps",
        "masked_attention_maps",
        "attention_rows",
        "attention_columns",
        "allocate",
        "transition",
        "isa",
        "runnable_isas",
    ),
    "libstar_kernels_cuda.so": (
        *_POLICY,
        "policy_workspace_bytes",
        "nft_workspace_bytes",
        "attention_forward",
        "architectures",
    ),
}


@cache
def cpu() -> Any:
    """The CPU kernels (see csrc/cpu/exports.cpp), or None with one warning if they cannot be loaded."""
    library, problem = load(CPU)
    if library is None:
        warn(
            f"star_kernels is falling back to PyTorch operations, which are slower: {problem}. Reinstall with a C++17 "
            "compiler on PATH (pip install -v shows the build)."
        )
    return library


@cache
def cuda() -> Any:
    """The CUDA kernels (see csrc/cuda), or None if they cannot be loaded."""
    return load("libstar_kernels_cuda.so")[0]


@constant_in_graph
def problem(device: str) -> str | None:
    """What prevents the compiled kernels from running on a device, or None. A missing CPU library warns once."""
    if device not in ("cpu", "cuda"):
        return "CPU or CUDA tensors are required"
    found = cpu() if device == "cpu" else cuda()
    return None if found is not None else load(f"libstar_kernels_{device}.so")[1]


@cache
def load(name: str) -> tuple[Any | None, str | None]:
    """A library of ``star_kernels/lib`` and None, or None and what prevents its use."""
    path = FOLDER / name
    if not path.exists():
        return None, f"{path} was not built"
    try:
        import tvm_ffi
    except ImportError:
        return None, "the package apache-tvm-ffi is not installed"
    try:
        module = tvm_ffi.load_module(str(path))
        # Looked up once: finding a function takes several times as long as calling it.
        library = SimpleNamespace(**{function: getattr(module, function) for function in FUNCTIONS[name]})
        if "cpu" in name:
            library.isa()
        return library, None
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"


def threads() -> int:
    """The number of threads that a CPU kernel may use: PyTorch's setting."""
    return torch.get_num_threads()
