"""The Hopper kernel's functions on CPU tensors: csrc/cuda compiled for the host with the headers of cuda_emulation."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from build_folder import build_folder, write

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).with_name("cuda_emulation")
SOURCES = ROOT / "csrc/cuda"
LAUNCH = re.compile(r"(\w+<S>)<<<(.+?)>>>\(")


def function(source: str, name: str) -> str:
    """The text of a function of csrc/cuda/hopper.cuh."""
    found = re.search(rf"^[^\n/]*\b{name}\([^{{]*{{.*?(?:}}|\n}})$", source, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[0]


def build(factory: pytest.TempPathFactory, *, variants: bool = False) -> Any:
    """Compiles the kernel, with or without its variants, and the probe; all processes of the tests share them."""
    import tvm_ffi

    tvm_ffi_cpp = pytest.importorskip("tvm_ffi.cpp")
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    launch, count = LAUNCH.subn(r"emulation::launch_hopper(\1, \2)(", (SOURCES / "attention_launch.cuh").read_text())
    assert count == 1
    hopper = (SOURCES / "hopper.cuh").read_text()
    descriptors = [function(hopper, name) for name in ("shared_descriptor", "advance")]
    name = "emulated_hopper_variants" if variants else "emulated_hopper"
    kernels = ["attention_forward", *(["attention_variants"] if variants else [])]
    with build_folder(name, factory) as folder:
        sources = [SOURCES / "attention_exports.cpp", EMULATION / "probe.cpp"]
        for kernel in kernels:
            sources.append(folder / f"{kernel}.cpp")
            write(sources[-1], (SOURCES / f"{kernel}.cu").read_text())
        write(folder / "include/cuda/attention_launch.cuh", launch)
        write(folder / "include/hopper_descriptors.h", "\n\n".join(descriptors) + "\n")
        includes = (folder / "include", EMULATION, ROOT / "tests/cuda_emulation", ROOT / "csrc")
        return tvm_ffi.load_module(
            tvm_ffi_cpp.build(
                name=name,
                cpp_files=[str(source) for source in sources],
                extra_cflags=["-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-psabi"],
                extra_include_paths=[str(path) for path in includes],
                build_directory=str(folder),
            )
        )
