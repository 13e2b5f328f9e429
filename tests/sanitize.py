"""Tests the compiled CPU library with GCC's sanitizers (`make sanitize`).

    python tests/sanitize.py [--cases 1000] [--tests ...]

The script builds csrc with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize, and runs the contract
tests of the compiled kernels and random calls (tests/fuzz.py) with it. PyTorch's memory is allocated by the sanitizer,
which therefore detects reads and writes past the end of a tensor. ThreadSanitizer runs on a program without PyTorch
(tests/csrc/driver.cpp), because it does not support the synchronisation of libgomp and would report races in PyTorch.
The script stops at the first error.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import kernel_driver

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitize"
ADDRESS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]
CONTRACT = [
    "tests/policy/test_policy_loss.py",
    "tests/policy/test_policy_options.py",
    "tests/policy/test_nft_loss.py",
    "tests/policy/test_sampling.py",
    "tests/policy/test_policy_errors.py",
    "tests/policy/test_policy_extremes.py",
    "tests/policy/test_policy_invariants.py",
    "tests/attention/test_maps.py",
    "tests/attention/test_attention.py",
    "tests/attention/test_attention_errors.py",
    "tests/attention/test_attention_gradients.py",
    "tests/attention/test_attention_layouts.py",
    "tests/attention/test_attention_operators.py",
    "tests/attention/test_attention_extremes.py",
]
# Tests of compilation and of peak memory are left out.
NATIVE = "(native or auto or vendor or error or named) and not compile and not peak and not no_matrix"


def build_library() -> Path:
    """Builds the library with sanitizers and returns its folder."""
    flags = [*ADDRESS, "-fno-omit-frame-pointer", "-g1"]
    environment = {
        **os.environ,
        "CXX": " ".join([*kernel_driver.compiler(), *flags]),
        "STAR_KERNELS_CUDA": "0",
        "STAR_KERNELS_REQUIRE": "1",
        "STAR_KERNELS_BUILD": "",
    }
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        f"--build-lib={FOLDER}",
        f"--build-temp={FOLDER / 'temp'}",
    ]
    run(command, environment)
    return FOLDER / "star_kernels" / "lib"


def environment_of(library: Path) -> dict[str, str]:
    """The environment of a process that loads the library: the sanitizers and libstdc++ are loaded first."""
    first = [
        subprocess.run(
            [*kernel_driver.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(first),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python has many leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "STAR_KERNELS_LIB": str(library),
    }


def run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"a sanitizer reported an error, or a test failed: exit status {done.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="sanitize.py", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="number of random calls (default: 1000)")
    parser.add_argument("--tests", nargs="*", default=CONTRACT, help="test files (default: the contract tests)")
    options = parser.parse_args()
    for flags in (ADDRESS, THREADS):
        if not kernel_driver.runs(*flags):
            raise SystemExit(f"programs compiled with {flags[0]} do not run on this machine")
    for name, flags in (("address", ADDRESS), ("threads", THREADS)):
        program = kernel_driver.build(FOLDER / name, ["-O1", "-g1", *flags])
        run([program, str(options.cases)])
    environment = environment_of(build_library())
    loads = "from star_kernels import native; assert native.cpu(), native.load('libstar_kernels_cpu.so')"
    run([sys.executable, "-c", loads], environment)
    if options.tests:
        run(
            [sys.executable, "-m", "pytest", "-q", "-x", *options.tests, "-k", NATIVE],
            environment,
        )
    run([sys.executable, "tests/fuzz.py", "--cases", str(options.cases)], environment)


if __name__ == "__main__":
    main()
