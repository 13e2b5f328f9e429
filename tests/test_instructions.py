"""How many instructions each CPU kernel runs, counted by valgrind against tests/baselines/instructions.json."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import baselines
import kernel_driver
import pytest

from star_kernels import native

ISA = "avx2"
ALLOWED = 0.02  # what addresses change, in the loops of the C library
KERNELS = {  # as the driver calls them -> the function that is counted
    "policy_forward": "policy_forward",
    "policy_backward": "policy_backward",
    "policy_location_forward": "policy_forward",
    "policy_location_backward": "policy_backward",
    "nft_forward": "nft_forward",
    "nft_backward": "nft_backward",
    "sample_transition": "sample_transition",
    "attention_maps": "attention_maps",
}


def count(program: Path, kernel: str) -> int:
    """Instructions of one call, whatever it calls included."""
    function = f"--toggle-collect=star::{ISA}::{KERNELS[kernel]}(*"
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", function, str(program), "once", kernel]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


@pytest.mark.exhaustive
@pytest.mark.native
def test_no_kernel_runs_more_instructions_than_it_did(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind")
    if ISA not in native.cpu().runnable_isas().split():
        pytest.skip(f"this processor does not run {ISA}")
    program = kernel_driver.build(tmp_path, isa=ISA)
    with ThreadPoolExecutor(2) as pool:
        counted = dict(zip(KERNELS, pool.map(lambda kernel: count(program, kernel), KERNELS), strict=True))
    assert min(counted.values()) > 10_000
    baselines.compare("instructions", f"{kernel_driver.version()}, {' '.join(platform.libc_ver())}", counted, ALLOWED)
