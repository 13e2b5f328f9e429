"""Checks the attention kernel for Hopper in growing steps: python -m tools.hopper_right

Every shape of the kernel runs in a process of its own: one block with one tile of keys, more tiles, partial tiles,
more heads, more tiles than blocks, maps, key masks, strides. The first step that fails ends the process and is
explained: the first wrong tile and the operand that is probably wrong, from probes with inputs whose results show
single columns and keys; or, if a wait did not end, the barriers that warps of the kernel were waiting for.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from star_kernels import TokenSelection
from star_kernels.attention import hopper, naive
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.hopper import DEFAULTS, VARIANTS, Variant

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE, MAP_TOLERANCE = 2e-2, 1e-3  # relative RMS error; maps are float32
STATUS_WARPS, STATUS_WORDS = 16, 4


@dataclass(frozen=True)
class Step:
    name: str
    batch: int = 1
    heads: int = 1
    queries: int = 0
    keys: int = 0
    tokens: int = 0  # 0: without maps
    phrases: int = 1
    rows: tuple[int, int] | None = None
    masked: str = ""  # "some" keys, or "all" of the last sequence
    transposed: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.bfloat16


def steps(shape: Variant, head_dim: int) -> Iterator[Step]:
    """From one block and one tile to the sizes of models."""
    rows, keys = 64 * shape.consumers, shape.keys
    yield Step("one tile of queries and keys", 1, 1, rows, keys)
    for count in (2, 3, 5, 9):
        yield Step(f"{count} tiles of keys", 1, 1, rows, count * keys)
    for count in (1, 2, 3 * keys - 1, keys + 1, 2 * keys + 33):
        yield Step(f"{count} keys", 1, 1, rows, count)
    for count in (1, 63, rows - 1, rows + 1):
        yield Step(f"{count} queries", 1, 1, count, 2 * keys)
    yield Step("heads and sequences", 2, 3, rows, 2 * keys)
    yield Step("more tiles than blocks", 2, 150, rows, keys)
    yield Step("more tiles than blocks, partial ones", 3, 50, 3 * rows - 5, 3 * keys - 7)
    yield Step("transposed", 2, 3, 200, 300, transposed=True)
    yield Step("scale", 2, 3, 200, 300, scale=-0.3)
    for tokens in (1, 16, 17, 40):
        yield Step(f"maps of {tokens} tokens", 2, 3, 200, 300, tokens=tokens)
    yield Step("maps of phrases", 2, 3, 200, 300, tokens=20, phrases=5)
    yield Step("maps of some rows", 2, 3, 5 * rows, 300, tokens=9, rows=(rows + 3, 2 * rows))
    yield Step("key mask", 2, 3, 200, 300, tokens=20, masked="some")
    yield Step("a sequence without keys", 2, 3, 200, 300, tokens=20, masked="all")
    if shape == DEFAULTS[head_dim]:
        yield Step("float16", 2, 3, 200, 300, tokens=20, phrases=2, masked="some", dtype=torch.float16)
    yield Step("SD3.5", 2, 24, 1357, 1357, tokens=6, rows=(0, 1024))


def make(step: Step, head_dim: int, device: str) -> tuple[Tensor, Tensor, Tensor, MapArguments]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(step.batch, step.heads, n, head_dim) for n in (step.queries, step.keys, step.keys)]
    if step.transposed:
        sizes = [(b, n, h, d) for b, h, n, d in sizes]
    tensors = [torch.randn(size, generator=generator).to(device, step.dtype) for size in sizes]
    query, key, value = (t.transpose(1, 2) if step.transposed else t for t in tensors)
    tokens = max(step.tokens, 1)
    chosen = [[(7 * t + b) % step.keys for t in range(tokens)] for b in range(step.batch)]
    index = TokenSelection.from_positions(chosen).index.to(device)
    weight = torch.rand(step.batch, step.phrases, index.shape[1], generator=generator).to(device)
    mask = None
    if step.masked:
        mask = torch.rand(step.batch, step.keys, generator=generator) < 0.7
        mask[-1] &= step.masked != "all"
        mask = mask.to(device)
    start, n_rows = step.rows or (0, step.queries)
    scale = head_dim**-0.5 if step.scale is None else step.scale
    return query, key, value, MapArguments(index, weight, mask, start, n_rows, scale, False)


def wrong(name: str, got: Tensor, want: Tensor, rows: int, dimension: int) -> str:
    """What differs from the reference, and where first, in tiles of ``rows``; empty if nothing does."""
    same = got.float() == want.float()  # infinities among them
    difference = torch.where(same, 0.0, got.float() - want.float()).nan_to_num(nan=1e6, posinf=1e6, neginf=1e6)
    finite = want.float().nan_to_num(neginf=0.0)
    tolerance = MAP_TOLERANCE if name == "maps" else TOLERANCE
    error = float(difference.norm() / finite.norm().clamp(min=1e-6))
    largest = float(finite.square().mean().sqrt().clamp(min=1e-6))
    bad = difference.abs() > 8 * tolerance * largest
    if error <= tolerance and not bad.any():
        return ""
    where = bad if bad.any() else difference.abs() == difference.abs().max()
    first = where.nonzero()[0].tolist()
    tiles = sorted({int(row) // rows for row in where.nonzero()[:, dimension].unique()})
    return (
        f"{name}: relative error {error:.1e}, {int(where.sum())} of {where.numel()} wrong, first at {first}, in tiles "
        f"{tiles[:12]} of {rows} rows; got {float(got[tuple(first)]):.4g}, expected {float(want[tuple(first)]):.4g}"
    )


def probes(head_dim: int, shape: Variant, device: str) -> Iterator[str]:
    """Which columns and keys are wrong, from inputs that show single ones."""
    rows, keys = 64 * shape.consumers, shape.keys
    eye = torch.eye(head_dim, device=device)

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = [t.to(device, torch.bfloat16).contiguous() for t in (query, key, value)]
        index = torch.zeros(len(query), 1, dtype=torch.int32, device=device)
        arguments = MapArguments(index, torch.ones(len(query), 1, 1, device=device), None, 0, rows, 1.0, False)
        out, _, lse = hopper.attention(*tensors, arguments, with_maps=False, variant=shape)
        want, _, want_lse = naive.attention(*tensors, arguments)
        return out.float(), lse, want.float(), want_lse

    def numbers(bad: Tensor) -> str:
        found = bad.nonzero().flatten().tolist()
        return "none" if not found else f"{len(found)} of {bad.numel()}: {found[:24]}"

    query = eye.repeat(rows // head_dim + 1, 1)[:rows][None, None]
    _, lse, _, want = run(query, torch.randn(1, 1, keys, head_dim), torch.zeros(1, 1, keys, head_dim))
    columns = torch.arange(rows, device=device) % head_dim
    bad = torch.zeros(head_dim, dtype=torch.bool, device=device)
    bad[columns[((lse - want).abs() > 0.02)[0, 0]]] = True
    yield f"columns of queries and keys (descriptors of both, their pattern): {numbers(bad)}"
    yield f"rows of queries: {numbers(((lse - want).abs() > 0.02)[0, 0])}"
    ramp = torch.arange(head_dim).float().expand(1, 1, keys, head_dim)
    out, _, want, _ = run(torch.zeros(1, 1, rows, head_dim), torch.zeros(1, 1, keys, head_dim), ramp)
    bad = ((out - want).abs() > 1).any(2)[0, 0]
    yield f"columns of values (descriptor of values, order of the output): {numbers(bad)}"
    key = torch.zeros(1, keys, keys, head_dim)
    key[0, torch.arange(keys), torch.arange(keys)] = 4.0
    out, lse, want, want_lse = run(torch.ones(1, keys, rows, head_dim), key, torch.randn(1, keys, keys, head_dim))
    yield f"keys (lost or masked ones): {numbers(((lse - want_lse).abs() > 1).any(2)[0])}"
    bad = ((out - want).abs() > 0.1).any(3).any(2)[0]
    yield f"values of keys (order of the probabilities, step of values): {numbers(bad)}"


def waiting(status: Tensor, shape: Variant) -> list[str]:
    """What warps of the kernel were waiting for, from their records [blocks, warps, 4]."""
    counts = {"query full": shape.consumers, "query free": shape.consumers}
    counts |= dict.fromkeys(("key full", "key free", "value full", "value free"), shape.stages)
    counts |= {"token full": 2, "token free": 2}
    names = [f"{name} {i}" for name, count in counts.items() for i in range(count)]
    warps = 4 * (shape.consumers + 1)
    records = status.view(-1, STATUS_WORDS)[: status.numel() // STATUS_WORDS // warps * warps].view(
        -1, warps, STATUS_WORDS
    )
    found = []
    for block, warp in (records[..., 0] != 0).nonzero().tolist():
        barrier, parity, tile, step = records[block, warp].tolist()
        role = ("copies" if warp == 0 else "gathers") if warp < 4 else f"consumer {warp // 4 - 1}"
        name = names[barrier - 1] if barrier <= len(names) else f"barrier {barrier - 1}"
        found.append(f"block {block}, warp {warp} ({role}): {name}, parity {parity}, tile {tile}, step {step}")
    return found


def check(step: Step, head_dim: int, shape: Variant, status: Tensor) -> list[str]:
    """What is wrong with the results of a step; empty if they agree with the reference."""
    *tensors, arguments = make(step, head_dim, "cuda")
    got = hopper.attention(
        *tensors, arguments, with_maps=step.tokens > 0, variant=shape, status=status.data_ptr() if status.numel() else 0
    )
    torch.cuda.synchronize()
    want = naive.attention(*tensors, arguments)
    found = [wrong("log-sum-exp", got[2], want[2], 64, 2), wrong("output", got[0], want[0], 64, 2)]
    if got[1] is not None:
        found.append(wrong("maps", got[1], want[1], 64, 3))
    return [problem for problem in found if problem]


def run_shape(head_dim: int, shape: Variant) -> int:
    """Runs the steps of a shape up to the first that fails."""
    status = torch.zeros(1024 * STATUS_WARPS * STATUS_WORDS, dtype=torch.int32).pin_memory()
    for step in steps(shape, head_dim):
        started = time.perf_counter()
        try:
            problems = check(step, head_dim, shape, status)
        except RuntimeError as error:
            print(f"FAILED {step.name}: {str(error).splitlines()[0]}")
            print("\n".join(f"  waits: {line}" for line in waiting(status, shape)[:40]) or "  no record of a wait")
            return 1
        print(f"{'FAILED' if problems else 'ok':<7}{time.perf_counter() - started:5.1f} s  {step.name}", flush=True)
        if problems:
            print("\n".join(f"  {problem}" for problem in problems))
            print(
                "  a wrong log-sum-exp: queries, keys or masks; a wrong output alone: probabilities or values",
                flush=True,
            )
            print("\n".join(f"  wrong {line}" for line in probes(head_dim, shape, "cuda")))
            return 1
    return 0


def shapes() -> list[tuple[int, Variant]]:
    """All shapes of the kernel, the defaults first."""
    found = [(head_dim, shape) for head_dim, shape in DEFAULTS.items()]
    return found + [(head_dim, Variant(*numbers)) for head_dim, variants in VARIANTS.items() for numbers in variants]


def run_apart(seconds: float) -> int:
    """Runs each shape in a process of its own, and prints their reports in order."""
    end = time.monotonic() + seconds

    def report(number: int) -> tuple[int, str]:
        command = [sys.executable, "-m", "tools.hopper_right", "--shape", str(number)]
        try:
            limit = max(0.1, end - time.monotonic())
            done = subprocess.run(command, cwd=ROOT, timeout=limit, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired as late:
            return 1, f"{(late.stdout or b'').decode()}not finished after {seconds:.0f} s"
        return done.returncode, done.stdout + done.stderr[-2000:] * (done.returncode not in (0, 1))

    found = shapes()
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(report, range(len(found))))
    failed = []
    for (head_dim, shape), (status, text) in zip(found, reports, strict=True):
        name = f"head dim {head_dim}, {tuple(shape)}"
        failed += [name] if status else []
        print(f"{name}: {'FAILED' if status else 'right'}\n{text}" if status else f"{name}: right")
    print(f"FAILED: {'; '.join(failed)}" if failed else f"all {len(found)} shapes of the kernel are right")
    return int(bool(failed))


def problem() -> str:
    """Why the kernel cannot run on this machine; empty if it can."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return hopper.obstacle(torch.bfloat16, 128, capability) or ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.hopper_right", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, help="run only the shape of this number, in this process")
    parser.add_argument("--seconds", type=float, default=100.0, help="time limit of all shapes (default: 100)")
    options = parser.parse_args(arguments)
    if refusal := problem():
        parser.error(f"no Hopper GPU to run on: {refusal}")
    if options.shape is None:
        return run_apart(options.seconds)
    return run_shape(*shapes()[options.shape])


if __name__ == "__main__":
    sys.exit(main())
