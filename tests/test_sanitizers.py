"""The CPU kernels under the compiler's sanitizers, in a program without Python. tests/sanitize.py does more."""

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
def test_the_kernels_run_without_a_finding(name: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    if shutil.which(kernel_driver.compiler()[0]) is None or "clang" in kernel_driver.version():
        pytest.skip("needs GCC, whose OpenMP calls tests/csrc/openmp.cpp stands in for")
    flags = SANITIZERS[name]
    if not kernel_driver.runs(*flags):
        pytest.skip(f"programs do not run here with {flags[0]}")
    program = kernel_driver.build(tmp_path, ["-O1", "-g1", *flags])
    done = subprocess.run([program, CASES[name]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(CASES[name])
