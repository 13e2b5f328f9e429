"""Tests the numeric contract with each instruction set and number of threads of this processor (`make numerics`).

    python tests/numerics.py [--brief] [ARGUMENTS OF PYTEST]

The tests run once for each instruction set and number of threads. The instruction set is that of PyTorch
(ATEN_CPU_CAPABILITY) and of the compiled kernels (STAR_KERNELS_ISA). The exit status is 1 if any run fails.
With --brief, instruction sets that are not the default run with one thread only, and the default not with two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from star_kernels import native

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = [
    "tests/attention/test_attention.py",
    "tests/attention/test_attention_extremes.py",
    "tests/attention/test_attention_gradients.py",
    "tests/attention/test_attention_layouts.py",
    "tests/attention/test_maps.py",
    "tests/policy/test_nft_loss.py",
    "tests/policy/test_policy_extremes.py",
    "tests/policy/test_policy_invariants.py",
    "tests/policy/test_policy_loss.py",
    "tests/policy/test_policy_options.py",
    "tests/policy/test_sampling.py",
    "tests/policy/test_transitions.py",
    "tests/test_allocation.py",
    "tests/test_allocation_kernel.py",
]
# Tests of compilation, operator schemas, peak memory and child processes do not depend on instructions or threads.
NUMBERS = "not compile and not opcheck and not gradcheck and not no_matrix and not instruction_set"
CAPABILITIES = {"default": "baseline", "avx2": "avx2", "": ""}  # PyTorch's name -> the kernels' name; "" is the default
THREADS = (1, 2, 4)


def runs(capability: str) -> bool:
    """Whether the instruction set is to be tested: the processor has it, and the default is not one of the others."""
    if not capability:
        return torch.backends.cpu.get_cpu_capability().lower() not in CAPABILITIES
    library = native.cpu()
    return library is None or CAPABILITIES[capability] in library.runnable_isas().split()


def run(capability: str, threads: int, arguments: list[str]) -> bool:
    environment = {k: v for k, v in os.environ.items() if k not in ("ATEN_CPU_CAPABILITY", "STAR_KERNELS_ISA")}
    environment |= {"OMP_NUM_THREADS": str(threads)}
    if capability:
        environment |= {"ATEN_CPU_CAPABILITY": capability, "STAR_KERNELS_ISA": CAPABILITIES[capability]}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", NUMBERS, *arguments, *CONTRACT]
    name = f"{capability or 'best available'} instructions, {threads} thread{'s' if threads > 1 else ''}"
    print(f"numerics: {name} ...", flush=True)
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    print(
        "\n".join(lines[-1:] if done.returncode == 0 else lines), f"[{time.perf_counter() - began:.0f} s]", flush=True
    )
    return done.returncode == 0


def threads_of(capability: str, brief: bool) -> tuple[int, ...]:
    """The numbers of threads to test with an instruction set."""
    default = torch.backends.cpu.get_cpu_capability().lower()
    if not brief:
        return THREADS
    return (1, 4) if capability in ("", default) else (1,)


def main(arguments: list[str]) -> int:
    brief = "--brief" in arguments
    arguments = [argument for argument in arguments if argument != "--brief"]
    skipped = [capability for capability in CAPABILITIES if not runs(capability)]
    for capability in skipped:
        missing = f"this processor does not have {capability} instructions"
        print(f"numerics: {missing if capability else 'the best available instructions are among those tested'}")
    chosen = [c for c in CAPABILITIES if c not in skipped]
    outcomes = [run(c, threads, arguments) for c in chosen for threads in threads_of(c, brief)]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
