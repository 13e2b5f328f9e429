"""Tunes the kernels that attention uses on this GPU: python -m tools.tune_attention

For the shapes of SD3.5-M and FLUX, it times attention with maps, forward and backward, by the Triton kernels with
several tiles, and by PyTorch's kernels followed by the map kernel. The fastest kernels are written to a JSON file for
the device, in the folder that the package reads. Use --out for another folder, and STAR_KERNELS_TUNED=DIR to read it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reporting import environment
from benchmarks.timing.clocks import Clock, kernel_clock
from benchmarks.timing.harness import Budget, Figure, Variant, interleave
from benchmarks.variants.attention import FLUX_1024, SD35_512, SD35_1024, Inputs, Shape, make_inputs
from star_kernels.attention import dispatch, naive, ops, tuning, vendor
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.triton_config import BackwardConfig, Tile, architecture, backward_config, forward_config

SHAPES = (
    (replace(SD35_512, batch=16), torch.bfloat16),
    (replace(SD35_1024, batch=4), torch.bfloat16),
    (replace(FLUX_1024, batch=2), torch.bfloat16),
    (replace(FLUX_1024, name="FLUX 512²", batch=4, image=1024), torch.bfloat16),
    (replace(SD35_512, batch=2), torch.float32),
)
# Relative RMS error allowed against the reference implementation in float32.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Candidate:
    """A kernel to time, and the tile or tiles of a Triton kernel."""

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
    """The default tile, and variations: half the rows, twice the keys, one stage more or less, no register limit."""
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
    """The default tiles of the backward pass, and variations."""
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
    """Attention with maps by every kernel that supports the inputs."""
    from star_kernels.attention import triton_forward

    arguments = map_arguments(x)

    def ours(tile: Tile) -> Run:
        return lambda: triton_forward.attention(x.query, x.key, x.value, arguments, config=tile)

    dtype, width = x.query.dtype, x.shape.head_dim
    kernels = supported_kernels(dtype, width)
    if dispatch.kernel_obstacle("hopper", dtype, width) is None:
        kernels.append("hopper")
    found = [Candidate(kernel, lambda kernel=kernel: forward(x, kernel)) for kernel in kernels]
    if dispatch.kernel_obstacle("triton", dtype, width) is None:
        default = forward_config(architecture(x.query.device), width, dtype)
        tiles = [Candidate("triton", ours(tile), tile) for tile in forward_tiles(default)]
        found = [tiles[0], *found, *tiles[1:]]
    return found


def backward_candidates(x: Inputs) -> list[Candidate]:
    """The backward pass, for a gradient of the output only, by every kernel that supports the inputs."""
    from star_kernels.attention import triton_backward

    out, _, lse = forward(x, "auto")
    upstream = upstream_of(x)

    def ours(tiles: BackwardConfig) -> Run:
        return lambda: triton_backward.attention_backward(
            upstream, None, None, x.query, x.key, x.value, out, lse, map_arguments(x), config=tiles
        )

    def theirs(kernel: str) -> Run:
        flat = (*map_arguments(x)[:-1], kernel)
        return lambda: ops.attention_backward(upstream, None, None, x.query, x.key, x.value, out, lse, *flat)

    dtype, width = x.query.dtype, x.shape.head_dim
    found = [Candidate(kernel, theirs(kernel)) for kernel in supported_kernels(dtype, width)]
    if dispatch.kernel_obstacle("triton", dtype, width) is None:
        default = backward_config(architecture(x.query.device), width, dtype)
        tiles = [Candidate("triton", ours(tiles), tiles) for tiles in backward_tiles(default)]
        found = [tiles[0], *found, *tiles[1:]]
    return found


def supported_kernels(dtype: torch.dtype, head_dim: int) -> list[str]:
    """PyTorch's kernels that support the dtype and the head dimension."""
    return [kernel for kernel in vendor.KERNELS if dispatch.kernel_obstacle(kernel, dtype, head_dim) is None]


def forward(x: Inputs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return ops.attention(x.query, x.key, x.value, *map_arguments(x)[:-1], backend)


def map_arguments(x: Inputs, batch: slice = slice(None)) -> MapArguments:
    """The arguments of the maps of some samples."""
    index, weight = x.selection.index[batch], x.selection.weight[batch]
    return MapArguments(index, weight, None, *x.shape.rows, x.scale, reduce_heads=True)


def upstream_of(x: Inputs) -> Tensor:
    """A gradient of the output, with the memory layout of the output."""
    noise = torch.randn(x.query.shape, generator=torch.Generator().manual_seed(1))
    return torch.empty_like(x.query).copy_(noise)


def as_models_lay_out(x: Inputs) -> Inputs:
    """The inputs with the memory layout of the models' projections, [B, S, H, D]."""
    moved = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.query, x.key, x.value))
    return Inputs(x.shape, *moved, x.selection)


def reference_forward(x: Inputs) -> tuple[Tensor, ...]:
    """Output, maps and log-sum-exp of the last sample by the reference implementation, in float32, head by head."""
    arguments, heads = map_arguments(x, slice(-1, None)), []
    for h in range(x.shape.heads):
        query, key, value = (t[-1:, h : h + 1].float() for t in (x.query, x.key, x.value))
        heads.append(naive.attention(query, key, value, arguments))
    outs, maps, lses = zip(*heads, strict=True)
    return torch.cat(outs, dim=1), torch.stack(maps).mean(dim=0), torch.cat(lses, dim=1)


def reference_backward(x: Inputs) -> tuple[Tensor, ...]:
    """Gradients of the first head of the last sample by the reference implementation, in float32."""
    leaves = [t[-1:, :1].float().requires_grad_() for t in (x.query, x.key, x.value)]
    with torch.enable_grad():
        out = naive.attention(*leaves, map_arguments(x, slice(-1, None)))[0]
        return torch.autograd.grad(out, leaves, upstream_of(x)[-1:, :1].float())


def runnable(
    candidates: Sequence[Candidate], expected: Sequence[Tensor], tolerance: float, left: Callable[[], float]
) -> tuple[list[Candidate], dict[str, str]]:
    """Runs each candidate once and compares its results with the expected ones, which may cover only some heads.

    The first call compiles a tile, so no further tile is tried once ``left`` returns no time.

    Returns:
        The candidates that run and agree, and the reason for each of the others.
    """
    kept: list[Candidate] = []
    refused: dict[str, str] = {}
    for candidate in candidates:
        if candidate.tile is not None and kept and left() <= 0:
            refused[candidate.name] = "not tried: the time is used up"
            continue
        try:
            results = candidate.run()
            error = max(_difference(got, want) for got, want in zip(results, expected, strict=True))
        except Exception as problem:  # the tile does not fit this device, or torch is built without the kernel
            refused[candidate.name] = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:160]}"
            continue
        if error <= tolerance:
            kept.append(candidate)
        else:
            refused[candidate.name] = f"differs from the reference by {error:.1e} (relative RMS)"
    return kept, refused


def _difference(got: Tensor, want: Tensor) -> float:
    """Relative RMS difference on the last sample and the heads that the expected result has."""
    got = got[-1:, : want.shape[1]].float()
    return float((got - want).norm() / want.norm())


def time_candidates(candidates: Sequence[Candidate], clock: Clock, budget: Budget, title: str) -> dict[str, Figure]:
    variants = [Variant(c.name, c.name, c.run) for c in candidates]
    times = interleave(variants, clock, budget, title, warm_up=2)
    return {c.name: times.figure(c.name) for c in candidates}


def entry(
    shape: Shape, dtype: torch.dtype, forward: dict[str, Figure], backward: dict[str, Figure],
    candidates: dict[str, Candidate], refused: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """A row of the table: the fastest kernel of each pass, the fastest Triton tiles, and all times."""
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
    """The fastest tile of the Triton kernel, which calls with a mask or a gradient of the maps always use."""
    ours = [name for name in figures if candidates[name].tile is not None]
    return candidates[min(ours, key=lambda name: figures[name].median)].tile if ours else None


def _numbers(tile: Tile) -> list[int | None]:
    return [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, tile.max_registers]


def passes() -> tuple[tuple[str, Callable[[Inputs], list[Candidate]], Callable[[Inputs], tuple[Tensor, ...]]], ...]:
    """The name of each pass, its candidates and its reference results."""
    return (
        ("forward", forward_candidates, reference_forward),
        ("backward", backward_candidates, reference_backward),
    )


def compile_candidates(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    *,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Runs the candidates of a shape once, until the time is used up, and returns how many of them agree.

    Triton keeps the compiled kernels on disk, for other processes.
    """
    end = now() + seconds
    inputs = as_models_lay_out(make_inputs(shape, dtype, device))
    found = 0
    for _, make, reference in passes():
        found += len(runnable(make(inputs), reference(inputs), TOLERANCES[dtype], lambda: end - now())[0])
    return found


def tune(
    shapes: Sequence[tuple[Shape, torch.dtype]],
    device: torch.device,
    clock: Clock,
    seconds: float,
    *,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[dict[str, Any]]:
    """Yields a row for each shape until the time is used up. The shapes that are skipped are printed."""
    end = now() + seconds
    for number, (shape, dtype) in enumerate(shapes):
        part = (end - now()) / (len(shapes) - number) / 2  # seconds for the forward or the backward pass
        if part <= 0:
            print(f"skipped {shape}, {dtype}: the time is used up", file=sys.stderr)
            continue
        inputs = as_models_lay_out(make_inputs(shape, dtype, device))
        parts: list[dict[str, Figure]] = []
        candidates: dict[str, Candidate] = {}
        refused: dict[str, str] = {}
        for name, make, reference in passes():
            compiled = now() + 0.6 * part
            found = make(inputs)
            kept, problems = runnable(found, reference(inputs), TOLERANCES[dtype], lambda at=compiled: at - now())
            refused |= {f"{name} {candidate}": why for candidate, why in problems.items()}
            if not kept:
                break
            candidates |= {candidate.name: candidate for candidate in kept}
            budget = Budget(1000, 0.3 * part)
            parts.append(time_candidates(kept, clock, budget, f"{shape.name} {name}"))
        if len(parts) < 2:
            print(f"skipped {shape}, {dtype}: no kernel runs: {refused}", file=sys.stderr)
            continue
        yield entry(shape, dtype, parts[0], parts[1], candidates, refused)


def text(entries: Sequence[dict[str, Any]]) -> str:
    """The fastest candidates of each shape."""
    lines = []
    for row in entries:
        lines.append(f"{row['shape']}, {row['dtype']}")
        for part in ("forward", "backward"):
            times = sorted(row["milliseconds"][part].items(), key=lambda item: item[1][0])
            lines += [f"  {part:<9} {name:<44} {median:>9.4f} ms" for name, (median, _, _) in times[:4]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune_attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=tuning.FOLDER, help="folder for the table (default: in the package)"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="total time, including compilation (default: 120)")
    parser.add_argument("--quick", action="store_true", help="tune only the first shape")
    parser.add_argument(
        "--compile",
        type=int,
        choices=range(len(SHAPES)),
        help="only compile the candidates of the shape with this number, for later runs",
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"no GPU that torch {torch.__version__} can use (its CUDA version: {torch.version.cuda})")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    device = torch.device("cuda", torch.cuda.current_device())
    entries: list[dict[str, Any]] = []
    name = torch.cuda.get_device_name(device)
    described = {**environment.describe(device), "cudnn": torch.backends.cudnn.version()}
    shapes = SHAPES[:1] if options.quick else SHAPES
    if options.compile is not None:
        shape, dtype = SHAPES[options.compile]
        with torch.no_grad():
            count = compile_candidates(shape, dtype, device, options.seconds)
        print(f"{shape}, {dtype}: {count} candidates agree with the reference")
        return 0
    with torch.no_grad():
        for row in tune(shapes, device, kernel_clock(device), options.seconds):
            entries.append(row)
            tuning.write_table(options.out, name, described, entries)  # after each row, in case the run is stopped
            print(text([row]), flush=True)
    if not entries:
        print("no shape was measured", file=sys.stderr)
        return 1
    chosen = ", ".join(f"{row['head_dim']}: {row['forward']}/{row['backward']}" for row in entries)
    print(f"{len(entries)} of {len(shapes)} shapes, {chosen}; wrote {options.out / tuning.slug(name)}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
