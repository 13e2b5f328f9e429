"""The CUDA library's functions on CPU tensors: csrc/cuda compiled for the host with the headers of cuda_emulation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from build_folder import build_folder, write

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).with_name("cuda_emulation")
RUNTIME = ROOT / "tests/cuda_emulation"


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the compiled emulation; all processes of the tests share it."""
    tvm_ffi_cpp = pytest.importorskip("tvm_ffi.cpp")
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    launch = (ROOT / "csrc/cuda/launch.cuh").read_text()
    native_launch, launcher = (
        "kernel<<<t.blocks, t.threads, 0, stream>>>(",
        "emulation::launch(kernel, t.blocks, t.threads, 0, stream)(",
    )
    assert launch.count("<<<") == launch.count(native_launch) == 1
    with build_folder("emulated", tmp_path_factory) as folder:
        sources = [ROOT / "csrc/cuda/exports.cpp", EMULATION / "probe.cpp"]
        for kernel in (ROOT / "csrc/cuda").glob("[!a]*.cu"):  # attention has an emulation of its own
            sources.append(folder / f"{kernel.stem}.cpp")
            write(sources[-1], kernel.read_text())
        write(folder / "include/cuda/launch.cuh", launch.replace(native_launch, launcher))
        return tvm_ffi_cpp.build(
            name="emulated",
            cpp_files=[str(source) for source in sources],
            extra_cflags=["-O1", "-ffp-contract=off", "-Wno-unknown-pragmas"],
            extra_include_paths=[str(path) for path in (folder / "include", EMULATION, RUNTIME, ROOT / "csrc")],
            build_directory=str(folder),
        )


@pytest.fixture(scope="session")
def emulated(emulated_library: str) -> Any:
    """The CUDA library's functions, on CPU tensors."""
    import tvm_ffi

    return tvm_ffi.load_module(emulated_library)
