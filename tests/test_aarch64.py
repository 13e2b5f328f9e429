"""The CPU kernels on 64-bit ARM: cross-compiled, and run in an emulator on the inputs of the kernels of this machine.

The emulator requires aarch64-linux-gnu-g++ and qemu-aarch64 (Debian's packages g++-aarch64-linux-gnu and qemu-user).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import kernel_driver
import pytest
import torch
from torch import Tensor

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CASES = "20"
DTYPES = {"f": torch.float32, "h": torch.float16, "b": torch.bfloat16}


def outputs(command: list[str], path: Path) -> Iterator[Tensor]:
    """Runs the program on random cases of every kernel, and reads the outputs that it writes."""
    done = subprocess.run([*command, CASES, "3", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data, start = path.read_bytes(), 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 8], "little")
        values = bytearray(data[start + 9 : start + 8 + size])
        yield torch.frombuffer(values, dtype=DTYPES[chr(data[start + 8])])
        start += 8 + size


def test_a_build_for_another_processor_has_no_code_and_no_library_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    made = kernel_driver.setup()
    monkeypatch.setenv("STAR_KERNELS_MACHINE", "aarch64")
    monkeypatch.setattr(made["platform"], "machine", lambda: "x86_64")
    monkeypatch.setitem(made["cpu_rules"].__globals__, "compiler", lambda: COMPILER)
    rules = made["cpu_rules"]()
    assert "flow_policy.baseline.o" in rules
    assert not any(text in rules for text in ("avx", "STAR_X86", "-L/"))
    assert "build libtvm_ffi.so: stub" in rules
    assert [library.name for library in made["libraries"]()] == ["star_kernels.lib.libstar_kernels_cpu"]


def test_a_compiler_for_another_processor_than_the_named_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    if shutil.which("c++") is None:
        pytest.skip("requires c++")
    monkeypatch.setenv("STAR_KERNELS_MACHINE", "riscv64")
    monkeypatch.setenv("CXX", "c++")
    with pytest.raises(SystemExit, match="STAR_KERNELS_MACHINE is riscv64, but CXX='c\\+\\+' compiles for "):
        kernel_driver.setup()["compiler"]()


@pytest.mark.exhaustive
def test_the_kernels_give_the_results_of_this_machine_in_an_emulator(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    for program in (COMPILER, EMULATOR, kernel_driver.compiler()[0]):
        if shutil.which(program) is None:
            pytest.skip(f"requires {program}")
    here = kernel_driver.build(tmp_path / "here", ["-O1"])
    there = kernel_driver.build(tmp_path / "there", ["-O1", "-static"], with_compiler=[COMPILER])
    expected = list(outputs([str(here)], tmp_path / "expected"))
    found = list(outputs([EMULATOR, str(there)], tmp_path / "found"))
    assert len(found) == len(expected) > 100
    for one, two in zip(found, expected, strict=True):
        # Other compilers fuse other products and sums, and the C libraries round exponentials differently.
        size = float(two.float().nan_to_num(0.0, 0.0, 0.0).abs().max())
        error = 2e-5 if two.dtype == torch.float32 else 2 * torch.finfo(two.dtype).eps
        torch.testing.assert_close(one, two, rtol=error, atol=error * size, equal_nan=True)
