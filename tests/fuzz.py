"""Random calls of the public operations. Results are compared with the reference, and memory is checked.

    python tests/fuzz.py --cases 10000                               all operations, by their SHARES
    python tests/fuzz.py --operation maps --cases 500 --seed 3       one operation
    python tests/fuzz.py --operation maps --seed 3 --case 17         one case of an operation

Every input has its own memory, with random strides, offset and gaps, and some inputs are expanded. The gaps and the
memory around the input are filled with NaN and must not change. Outputs of the compiled library also have guards around
them, and are filled with a NaN that arithmetic does not produce, so that unwritten elements are detected. The error of
a result against float64 is at most a few times that of PyTorch in float32. One call in six has an invalid argument,
which the error must name.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable

import torch
from fuzzing.allocation import allocation
from fuzzing.attention import maps, whole
from fuzzing.errors import bad_argument
from fuzzing.memory import Draw, guarded_library
from fuzzing.policy import nft, policy, sampling

OPERATIONS: dict[str, Callable[[Draw], None]] = {
    "policy": policy,
    "nft": nft,
    "sampling": sampling,
    "maps": maps,
    "attention": whole,
    "allocation": allocation,
}
SHARES = {"policy": 0.35, "nft": 0.2, "sampling": 0.1, "maps": 0.15, "attention": 0.1, "allocation": 0.1}
BAD_SHARE = 1 / 6


def run_case(operation: str, seed: int, number: int) -> None:
    draw = Draw(seed, operation, number)
    try:
        if draw.chance(BAD_SHARE):
            bad_argument(draw, operation)
        else:
            OPERATIONS[operation](draw)
        draw.check_inputs()
    except Exception as error:
        again = f"python tests/fuzz.py --operation {operation} --seed {seed} --case {number}"
        raise AssertionError(f"{again}: {type(error).__name__}: {error}") from error


def cases_of(operation: str, cases: int) -> int:
    return math.ceil(cases * SHARES[operation])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz.py", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cases", type=int, default=400, help="number of calls (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (default: 0)")
    parser.add_argument("--operation", choices=list(OPERATIONS), help="run only this operation")
    parser.add_argument("--case", type=int, help="run only the case with this number; requires --operation")
    options = parser.parse_args(arguments)
    if options.case is not None and options.operation is None:
        parser.error("--case requires --operation")
    torch.use_deterministic_algorithms(True, warn_only=True)  # required by fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    failures = 0
    with guarded_library():
        if options.case is not None:
            run_case(options.operation, options.seed, options.case)
            return 0
        for operation in [options.operation] if options.operation else OPERATIONS:
            cases = options.cases if options.operation else cases_of(operation, options.cases)
            began, failed = time.perf_counter(), []
            for number in range(cases):
                try:
                    run_case(operation, options.seed, number)
                except AssertionError as error:
                    failed.append(str(error))
            print(f"{operation}: {cases} cases, {len(failed)} failed, {time.perf_counter() - began:.0f} s", flush=True)
            print("".join(f"  {line}\n" for line in failed[:20]), end="", flush=True)
            failures += len(failed)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
