"""The CPU kernels with the compiler's sanitizers, in a program without Python. tests/sanitize.py runs more tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import kernel_driver
import pytest

CASES = {"address and undefined behaviour": "150", "threads": "40"}
SANITIZERS = {
    "address and undefined behaviour": [
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
    ],
    "threads": ["-fsanitize=thread"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SANITIZERS)
def test_the_kernels_run_without_an_error_of_a_sanitizer(name: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    if shutil.which(kernel_driver.compiler()[0]) is None or "clang" in kernel_driver.version():
        pytest.skip("requires GCC, whose OpenMP functions tests/csrc/openmp.cpp implements")
    flags = SANITIZERS[name]
    if not kernel_driver.runs(*flags):
        pytest.skip(f"programs compiled with {flags[0]} do not run on this machine")
    program = kernel_driver.build(tmp_path, ["-O1", "-g1", *flags])
    done = subprocess.run([program, CASES[name]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(CASES[name])
