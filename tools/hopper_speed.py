"""Times the attention kernel for Hopper and all its shapes: python -m tools.hopper_speed

They are compared with PyTorch's kernels and with the Triton kernel, with and without maps, at the shapes of SD3.5-M
and FLUX. One run decides which shape of the kernel is the default, and whether "auto" takes it. Results that differ
from the reference are reported and not timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.variants.attention import FLUX_1024, SD35_512, SD35_1024, Inputs
from star_kernels.attention import dispatch, hopper, vendor
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.hopper import DEFAULT, VARIANTS, Variant
from tools.hopper_right import problem
from tools.map_variants import Candidate, compare_all
from tools.tune_attention import map_arguments

SHAPES = (
    replace(FLUX_1024, batch=2),
    replace(SD35_512, batch=2),
    replace(SD35_512, batch=16),
    replace(SD35_1024, batch=2),
    replace(SD35_1024, batch=16),
)


def candidates(x: Inputs, every: bool = True) -> list[Candidate]:
    """cuDNN first, which the others are compared with, then the kernels with and without maps."""
    from star_kernels.attention import triton_forward

    averaged = map_arguments(x)
    per_head = averaged._replace(reduce_heads=False)

    def theirs(kernel: str) -> Callable[[], tuple[Tensor, None]]:
        return lambda: (vendor.cuda_forward(kernel, x.query, x.key, x.value, x.scale)[0], None)

    def triton(with_maps: bool) -> Callable[[], Any]:
        return lambda: triton_forward.attention(x.query, x.key, x.value, per_head, with_maps=with_maps)[:2]

    def ours(variant: Variant, arguments: MapArguments, with_maps: bool) -> Callable[[], Any]:
        return lambda: hopper.attention(
            x.query, x.key, x.value, arguments, with_maps=with_maps, variant=variant
        )[:2]  # fmt: skip

    found = [
        Candidate(kernel, theirs(kernel))
        for kernel in ("cudnn", "flash")
        if dispatch.kernel_obstacle(kernel, x.query.dtype, x.shape.head_dim) is None
    ]
    found += [Candidate("triton", triton(False)), Candidate("triton, maps", triton(True))]
    found += [
        Candidate("hopper", ours(DEFAULT, per_head, False)),
        Candidate("hopper, maps", ours(DEFAULT, per_head, True)),
        Candidate("hopper, maps, mean", ours(DEFAULT, averaged, True)),
    ]
    for numbers in VARIANTS[x.shape.head_dim] if every else ():
        name = "hopper {}x{} stages {} overlap {}".format(*numbers)
        found.append(Candidate(name, ours(Variant(*numbers), per_head, False)))
        found.append(Candidate(f"{name}, maps", ours(Variant(*numbers), per_head, True)))
    return found


def host_microseconds(device: torch.device, calls: int = 200) -> float:
    """The time that a launch takes on the host, by a call whose kernel is short."""
    query = torch.randn(1, 2, 64, 64, device=device, dtype=torch.bfloat16)
    index, weight = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.ones(1, 1, 1, device=device)
    arguments = MapArguments(index, weight, None, 0, 64, 0.125, False)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            hopper.attention(query, query, query, arguments)
        best = min(best, time.perf_counter() - started)
    torch.cuda.synchronize()
    return 1e6 * best / calls


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.hopper_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the results as JSON (default: none are written)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time of each comparison (default: 10)")
    parser.add_argument("--defaults", action="store_true", help="only the default shapes of the kernel")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    if refusal := problem():
        parser.error(f"no Hopper GPU to run on: {refusal}")
    device = torch.device("cuda", torch.cuda.current_device())
    host = host_microseconds(device)
    print(f"a launch takes {host:.1f} us on the host", flush=True)
    make = partial(candidates, every=not options.defaults)
    path = options.out and options.out / "hopper-speed.json"
    return compare_all(((shape, make) for shape in SHAPES), device, options.seconds, path, host=host)


if __name__ == "__main__":
    sys.exit(main())
