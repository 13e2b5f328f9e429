"""The number of instructions of each CPU kernel, counted by valgrind and compared with tests/baselines."""

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
ALLOWED = 0.02  # variation of the loops in the C library with the addresses of buffers
KERNELS = {  # name in the driver -> function whose instructions are counted
    "policy_forward": "policy_forward",
    "policy_backward": "policy_backward",
    "policy_location_forward": "policy_forward",
    "policy_location_backward": "policy_backward",
    "policy_both": "policy_forward",
    "policy_location_both": "policy_forward",
    "nft_forward": "nft_forward",
    "nft_backward": "nft_backward",
    "nft_both": "nft_forward",
    "sample_transition": "sample_transition",
    "attention_maps": "attention_maps",
}


def count(program: Path, kernel: str) -> int:
    """The number of instructions of one call, including the functions that it calls."""
    function = f"--toggle-collect=star::{ISA}::{KERNELS[kernel]}(*"
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", function, str(program), "once", kernel]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


@pytest.mark.exhaustive
@pytest.mark.native
def test_no_kernel_runs_more_instructions_than_its_baseline(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    if shutil.which("valgrind") is None:
        pytest.skip("requires valgrind")
    if ISA not in native.cpu().runnable_isas().split():
        pytest.skip(f"this processor does not run {ISA}")
    program = kernel_driver.build(tmp_path, isa=ISA)
    with ThreadPoolExecutor(2) as pool:
        counted = dict(zip(KERNELS, pool.map(lambda kernel: count(program, kernel), KERNELS), strict=True))
    assert min(counted.values()) > 10_000
    baselines.compare("instructions", f"{kernel_driver.version()}, {' '.join(platform.libc_ver())}", counted, ALLOWED)
