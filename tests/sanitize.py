"""The compiled CPU library under GCC's sanitizers (`make sanitize`).

    python tests/sanitize.py [--cases 1000] [--tests ...]

Builds csrc with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize, and runs with it the tests of the
contract that the compiled kernels keep, then random calls (tests/fuzz.py). PyTorch's allocator goes through the
sanitizer's, so a read or a write past a tensor shows. The kernels' threads are checked in a program without PyTorch
(tests/csrc/driver.cpp): ThreadSanitizer does not see how libgomp synchronises, and would take PyTorch itself for one
race. Stops at the first finding.
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
# Compilers and the program's peak of memory are not what is tested here.
NATIVE = "(native or auto or vendor or error or named) and not compile and not peak and not no_matrix"


def build_library() -> Path:
    """The library's folder."""
    flags = [*ADDRESS, "-fno-omit-frame-pointer", "-g1"]
    environment = {
        **os.environ,
        "CXX": " ".join([*kernel_driver.compiler(), *flags]),
        "STAR_KERNELS_CUDA": "0",
        "STAR_KERNELS_REQUIRE": "1",
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
    """What a process needs to load the library: the sanitizer comes first, and libstdc++ with it for exceptions."""
    first = [
        subprocess.run(
            [*kernel_driver.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(first),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's are many
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "STAR_KERNELS_LIB": str(library),
    }


def run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"a finding, or a test that failed: exit status {done.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="sanitize.py", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="random calls")
    parser.add_argument("--tests", nargs="*", default=CONTRACT, help="test files; none: no tests")
    options = parser.parse_args()
    for flags in (ADDRESS, THREADS):
        if not kernel_driver.runs(*flags):
            raise SystemExit(f"programs do not run here with {flags[0]}")
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
