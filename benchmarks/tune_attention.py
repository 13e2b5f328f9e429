"""Fills the table by which attention chooses its kernels on a GPU: python benchmarks/tune_attention.py

For the shapes of SD3.5-M and FLUX it times attention with maps by Triton's kernels, in several tiles, and by PyTorch's
kernels with the map kernel behind them, and their backward passes. What is fastest goes into a JSON file for the kind
of device, in the folder that the package reads (or --out; STAR_KERNELS_TUNED=DIR makes the package read that one).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import environment
import torch
from attention_variants import FLUX_1024, SD35_512, SD35_1024, Inputs, Shape, make_inputs
from clocks import Clock, kernel_clock
from harness import Budget, Figure, Variant, interleave
from torch import Tensor

from star_kernels.attention import tuning, vendor
from star_kernels.attention.triton_config import BackwardConfig, Tile, architecture, backward_config, forward_config

SHAPES = (
    (replace(SD35_512, batch=16), torch.bfloat16),
    (replace(SD35_1024, batch=4), torch.bfloat16),
    (replace(FLUX_1024, batch=2), torch.bfloat16),
    (replace(FLUX_1024, name="FLUX 512²", batch=4, image=1024), torch.bfloat16),
    (replace(SD35_512, batch=2), torch.float32),
)
# Relative RMS between two kernels' results in a dtype, each rounded on its way.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
Run = Callable[[], Any]


@dataclass(frozen=True)
class Candidate:
    """A kernel, and its tile or tiles where it is Triton's."""

    kernel: str
    run: Run
    tile: Tile | BackwardConfig | None = None

    @property
    def name(self) -> str:
        if self.tile is None:
            return self.kernel
        tiles = [self.tile] if isinstance(self.tile, Tile) else [self.tile.query, self.tile.key_value]
        return " ".join(
            [self.kernel, *(f"{t.block_m}x{t.block_n}/{t.num_warps}w/{t.num_stages}s/{t.max_registers}" for t in tiles)]
        )


def forward_tiles(default: Tile) -> list[Tile]:
    """The shipped tile, and its neighbours: half as tall, twice as wide, one stage more or less, registers free."""
    near = [
        default,
        replace(default, block_m=default.block_m // 2, num_warps=max(4, default.num_warps // 2)),
        replace(default, block_n=2 * default.block_n),
        replace(default, num_stages=default.num_stages + 1),
        replace(default, num_stages=max(1, default.num_stages - 1)),
        replace(default, max_registers=None),
    ]
    return list(dict.fromkeys(near))


def backward_tiles(default: BackwardConfig) -> list[BackwardConfig]:
    query, key_value = default.query, default.key_value
    near = [
        default,
        replace(default, key_value=replace(key_value, max_registers=None)),
        replace(default, query=replace(query, max_registers=None)),
        replace(
            default,
            key_value=replace(key_value, block_n=max(32, key_value.block_n // 2), num_warps=4, max_registers=None),
        ),
        replace(default, key_value=replace(key_value, num_stages=max(1, key_value.num_stages - 1))),
    ]
    return list(dict.fromkeys(near))


def forward_candidates(x: Inputs) -> list[Candidate]:
    """Attention with its maps by every kernel that takes the inputs."""
    from star_kernels.attention import triton_forward, triton_maps

    rows, selection, scale = x.shape.rows, x.selection, x.scale
    arguments = (selection.index, selection.weight, None, rows, scale, True)

    def ours(tile: Tile) -> Run:
        return lambda: triton_forward.attention(x.query, x.key, x.value, *arguments, config=tile)

    def theirs(kernel: str) -> Run:
        def run() -> tuple[Tensor, Tensor, Tensor]:
            out, lse = vendor.cuda_forward(kernel, x.query, x.key, x.value, scale)
            return out, triton_maps.attention_maps(x.query, x.key, lse, *arguments, False), lse

        return run

    dtype, width = x.query.dtype, x.shape.head_dim
    found = []
    if tuning.obstacle("triton", dtype, width) is None:
        default = forward_config(architecture(x.query.device), width, dtype)
        found = [Candidate("triton", ours(tile), tile) for tile in forward_tiles(default)]
    able = [k for k in vendor.KERNELS if vendor.limits(k, dtype, width) is None]
    return found + [Candidate(kernel, theirs(kernel)) for kernel in able]


def backward_candidates(x: Inputs) -> list[Candidate]:
    """The gradient of the output by every kernel that takes the inputs."""
    from star_kernels.attention import triton_backward, triton_forward

    out, _, lse = triton_forward.attention(x.query, x.key, x.value, None, None, None, x.shape.rows, x.scale, True)
    upstream = torch.randn_like(out)

    def ours(tiles: BackwardConfig) -> Run:
        return lambda: triton_backward.attention_backward(
            upstream, None, None, x.query, x.key, x.value, out, lse, None, None, None, x.shape.rows, x.scale, True,
            config=tiles,
        )  # fmt: skip

    def theirs(kernel: str) -> Run:
        return lambda: vendor.cuda_backward(kernel, upstream, x.query, x.key, x.value, out, lse, x.scale)

    dtype, width = x.query.dtype, x.shape.head_dim
    found = []
    if tuning.obstacle("triton", dtype, width) is None:
        default = backward_config(architecture(x.query.device), width, dtype)
        found = [Candidate("triton", ours(tiles), tiles) for tiles in backward_tiles(default)]
    able = [k for k in vendor.KERNELS if vendor.limits(k, dtype, width) is None]
    return found + [Candidate(kernel, theirs(kernel)) for kernel in able]


def runnable(candidates: Sequence[Candidate], dtype: torch.dtype) -> tuple[list[Candidate], dict[str, str]]:
    """Those that run and agree with the first that does; and why the others do not."""
    kept: list[Candidate] = []
    refused: dict[str, str] = {}
    expected: Sequence[Tensor] | None = None
    for candidate in candidates:
        try:
            results = candidate.run()
        except Exception as problem:  # a tile that does not fit this device, a kernel that this build does not have
            refused[candidate.name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}"
            continue
        if expected is None:
            expected = results
        error = max(_difference(got, want) for got, want in zip(results, expected, strict=True))
        if error <= TOLERANCES[dtype]:
            kept.append(candidate)
        else:
            refused[candidate.name] = f"differs from {candidates[0].name} by {error:.1e} (relative RMS)"
    return kept, refused


def _difference(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def time_candidates(candidates: Sequence[Candidate], clock: Clock, budget: Budget, title: str) -> dict[str, Figure]:
    variants = [Variant(c.name, c.name, c.run) for c in candidates]
    times = interleave(variants, clock, budget, title, warm_up=2)
    return {c.name: times.figure(c.name) for c in candidates}


def entry(
    shape: Shape, dtype: torch.dtype, forward: dict[str, Figure], backward: dict[str, Figure],
    candidates: dict[str, Candidate], refused: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """A row of the table: the fastest of each pass, the tiles of those that are Triton's, and what was measured."""
    fastest = {
        "forward": candidates[min(forward, key=lambda name: forward[name].median)],
        "backward": candidates[min(backward, key=lambda name: backward[name].median)],
    }
    tiles: dict[str, list[int | None]] = {}
    if isinstance(tile := _best_tile(forward, candidates), Tile):
        tiles["forward"] = _numbers(tile)
    if isinstance(config := _best_tile(backward, candidates), BackwardConfig):
        tiles |= {"query": _numbers(config.query), "key_value": _numbers(config.key_value)}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": shape.head_dim,
        "size_class": tuning.size_class(shape.sequence, shape.sequence),
        "forward": fastest["forward"].kernel,
        "backward": fastest["backward"].kernel,
        "flash": vendor.flash_implementation(),
        "tiles": tiles,
        "shape": str(shape),
        "milliseconds": {
            part: {name: [round(1e3 * v, 4) for v in (f.median, f.p20, f.p80)] for name, f in figures.items()}
            for part, figures in (("forward", forward), ("backward", backward))
        },
        "refused": refused,
    }


def _best_tile(figures: dict[str, Figure], candidates: dict[str, Candidate]) -> Tile | BackwardConfig | None:
    """Of Triton's kernel, whether or not it is the fastest: calls with a mask or a gradient of the maps take it."""
    ours = [name for name in figures if candidates[name].tile is not None]
    return candidates[min(ours, key=lambda name: figures[name].median)].tile if ours else None


def _numbers(tile: Tile) -> list[int | None]:
    return [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, tile.max_registers]


def tune(
    shapes: Sequence[tuple[Shape, torch.dtype]], device: torch.device, clock: Clock, seconds: float
) -> list[dict[str, Any]]:
    """A row for each shape, as long as the time lasts; what it did not last for is said."""
    entries = []
    started = time.monotonic()
    for number, (shape, dtype) in enumerate(shapes):
        left = seconds - (time.monotonic() - started)
        if left <= 0:
            print(f"no time was left for {shape}, {dtype}", file=sys.stderr)
            continue
        each = Budget(1000, left / (len(shapes) - number) / 4)  # half of it goes to compiling
        inputs = make_inputs(shape, dtype, device)
        parts: list[dict[str, Figure]] = []
        candidates: dict[str, Candidate] = {}
        refused: dict[str, str] = {}
        for name, make in (("forward", forward_candidates), ("backward", backward_candidates)):
            kept, problems = runnable(make(inputs), dtype)
            refused |= {f"{name} {candidate}": why for candidate, why in problems.items()}
            candidates |= {candidate.name: candidate for candidate in kept}
            parts.append(time_candidates(kept, clock, each, f"{shape.name} {name}"))
        entries.append(entry(shape, dtype, parts[0], parts[1], candidates, refused))
    return entries


def text(entries: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in entries:
        lines.append(f"{row['shape']}, {row['dtype']}")
        for part in ("forward", "backward"):
            times = sorted(row["milliseconds"][part].items(), key=lambda item: item[1][0])
            lines += [f"  {part:<9} {name:<44} {median:>9.4f} ms" for name, (median, _, _) in times[:4]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tune_attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=tuning.FOLDER, help="folder for the table (default: the package's)")
    parser.add_argument("--seconds", type=float, default=120.0, help="time for everything, compiling included")
    parser.add_argument("--quick", action="store_true", help="the first shape alone")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"no GPU that torch {torch.__version__} can use (its CUDA version: {torch.version.cuda})")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.no_grad():
        entries = tune(SHAPES[:1] if options.quick else SHAPES, device, kernel_clock(device), options.seconds)
    print(text(entries))
    path = tuning.write_table(options.out, torch.cuda.get_device_name(device), environment.describe(device), entries)
    print(f"{len(entries)} of {len(SHAPES)} shapes; wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
