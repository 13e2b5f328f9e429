"""Compares variants of the kernels that compute maps on this GPU: python -m tools.map_variants

For SD3.5-M, Triton's attention with maps is compared with the same kernel without maps. The variants differ in what is
computed before the loop over the keys, whether the output is written last, whether maps are averaged over heads, and
whether the launch of the average starts before the end of the attention. For FLUX, the same for cuDNN's attention
followed by the map kernel; the map kernel alone, with several tiles and programs per multiprocessor, is also compared
with a copy of the queries. A variant whose results differ from the reference is reported and not timed, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.reporting import environment
from benchmarks.timing.clocks import Clock, kernel_clock
from benchmarks.timing.harness import Budget, Times, Variant, interleave
from benchmarks.variants.attention import FLUX_1024, SD35_512, SD35_1024, Inputs, Shape, make_inputs
from star_kernels.attention import naive, vendor
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.triton_config import Epilogue, overlaps_launches
from tools.tune_attention import as_models_lay_out, map_arguments

TRITON_SHAPES = (replace(SD35_512, batch=2), replace(SD35_512, batch=16), replace(SD35_1024, batch=2))
VENDOR_SHAPES = (replace(FLUX_1024, batch=2),)
EPILOGUES = tuple(Epilogue(tokens, last) for tokens in ("late", "keys", "scores") for last in (False, True))
STAGES, PROGRAMS = (2, 3, 4), (3, 4, 6)  # of the map kernel: of its pipeline, and on a multiprocessor
PARTS = ("late", "keys", "scores", "vendor")  # whose kernels are compiled at the same time
TOLERANCE = 3e-2  # relative RMS error of the maps and of the output


@dataclass(frozen=True)
class Candidate:
    """A variant to time, with a function that returns its output (None for maps alone) and its maps (or None)."""

    name: str
    run: Callable[[], tuple[Tensor | None, Tensor | None]]


def triton_candidates(x: Inputs) -> list[Candidate]:
    """Attention in Triton, without maps first."""
    from star_kernels.attention import triton_forward

    averaged = map_arguments(x)
    per_head = averaged._replace(reduce_heads=False)

    def ours(arguments: MapArguments, epilogue: Epilogue | None, with_maps: bool = True) -> Any:
        return lambda: triton_forward.attention(
            x.query, x.key, x.value, arguments, with_maps=with_maps, epilogue=epilogue
        )[:2]

    found = [Candidate("without", ours(per_head, None, with_maps=False)), Candidate("default", ours(per_head, None))]
    for epilogue in EPILOGUES:
        last = ", output last" if epilogue.output_last else ""
        found.append(Candidate(f"{epilogue.tokens}{last}", ours(per_head, epilogue)))
        for overlap in overlaps(x.query.device):
            how = " overlapped" if overlap else ""
            found.append(
                Candidate(f"{epilogue.tokens}{last}, mean{how}", ours(averaged, replace(epilogue, overlap=overlap)))
            )
    return found


def vendor_candidates(x: Inputs) -> list[Candidate]:
    """cuDNN's attention, followed by the map kernel."""
    from star_kernels.attention import triton_maps

    averaged = map_arguments(x)

    def theirs() -> tuple[Tensor, Tensor]:
        return vendor.cuda_forward("cudnn", x.query, x.key, x.value, x.scale)

    def followed(arguments: MapArguments, overlap: bool) -> tuple[Tensor, Tensor]:
        out, lse = theirs()
        return out, triton_maps.attention_maps(x.query, x.key, lse, arguments, overlap=overlap)

    found = [Candidate("without", lambda: (theirs()[0], None))]
    for name, arguments in (("per head", averaged._replace(reduce_heads=False)), ("mean", averaged)):
        for overlap in overlaps(x.query.device):
            how = " overlapped" if overlap else ""
            found.append(Candidate(f"{name}{how}", lambda a=arguments, o=overlap: followed(a, o)))
    return found


def map_candidates(x: Inputs) -> list[Candidate]:
    """A copy of the queries, and the map kernel alone, per head."""
    from star_kernels.attention import triton_maps
    from star_kernels.attention.triton_config import maps_config

    arguments = map_arguments(x)._replace(reduce_heads=False)
    lse = vendor.cuda_forward("cudnn", x.query, x.key, x.value, x.scale)[1].contiguous()
    start, length = x.shape.rows
    rows = x.query[:, :, start : start + length]
    copy = torch.empty_like(rows)
    count = torch.cuda.get_device_properties(x.query.device).multi_processor_count

    def run(stages: int, programs: int) -> tuple[None, Tensor]:
        tile = replace(maps_config(x.shape.head_dim, x.query.dtype, simple=True), num_stages=stages)
        with mock.patch.object(triton_maps, "resident_programs", return_value=programs * count):
            return None, triton_maps.attention_maps(x.query, x.key, lse, arguments, config=tile)

    found = [Candidate("copy", lambda: (copy.copy_(rows), None))]
    for stages in STAGES:
        for programs in PROGRAMS:
            name = f"map kernel, {stages} stages, {programs} programs"
            found.append(Candidate(name, lambda s=stages, p=programs: run(s, p)))
    return found


def overlaps(device: torch.device) -> tuple[bool, ...]:
    """Whether launches overlap, in the variants that the device supports."""
    return (False, True) if overlaps_launches(device) else (False,)


def reference(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and maps per head of the last sample by the reference implementation, in float32, head by head."""
    arguments, outs, maps = map_arguments(x, slice(-1, None))._replace(reduce_heads=False), [], []
    for h in range(x.shape.heads):
        query, key, value = (t[-1:, h : h + 1].float() for t in (x.query, x.key, x.value))
        out, found, _ = naive.attention(query, key, value, arguments)
        outs.append(out)
        maps.append(found)
    return torch.cat(outs, dim=1), torch.cat(maps, dim=2)


def problem_of(candidate: Candidate, expected: tuple[Tensor, Tensor]) -> str:
    """What is wrong with the results of a candidate; empty if they agree with the reference."""
    if candidate.name == "copy":
        return ""
    try:
        out, maps = candidate.run()
        if maps is not None and maps.ndim == 3:
            expected = expected[0], expected[1].mean(dim=2)
        for name, got, want in (("output", out, expected[0]), ("maps", maps, expected[1])):
            if got is not None:
                error = float((got[-1:].float() - want).norm() / want.norm())
                if not error <= TOLERANCE:
                    return f"{name}: relative RMS error {error:.1e}, allowed {TOLERANCE:.0e}"
    except Exception as problem:  # this device or version of torch does not have the kernel
        return f"{type(problem).__name__}: {problem}".splitlines()[0]
    return ""


def compare(shape: Shape, candidates: Sequence[Candidate], x: Inputs, clock: Clock, budget: Budget) -> dict[str, Any]:
    """Checks and times candidates, and returns the ratio of each to the first."""
    expected = reference(x)
    refused = {c.name: problem for c in candidates if (problem := problem_of(c, expected))}
    kept = [c for c in candidates if c.name not in refused]
    result: dict[str, Any] = {"shape": str(shape), "first": candidates[0].name, "refused": refused, "variants": {}}
    if candidates[0].name in refused:
        return result
    times = interleave([Variant(c.name, c.name, c.run) for c in kept], clock, budget, shape.name, warm_up=2)
    result["variants"] = {c.name: row(times, c.name, kept[0].name) for c in kept}
    return result


def row(times: Times, name: str, first: str) -> dict[str, Any]:
    ratio = times.ratio(name, first)
    return {"microseconds": round(1e6 * times.figure(name).median, 2), "ratio": asdict(ratio)}


def text(result: dict[str, Any]) -> str:
    """A line for each variant. The share of a copy counts its reads and its writes, and the reads of the map kernel."""
    first, copied = result["first"], result["first"] == "copy"
    lines = [result["shape"]]
    for name, found in result["variants"].items():
        ratio = found["ratio"]
        interval = "" if ratio["low"] is None else f" [{ratio['low']:.4f}, {ratio['high']:.4f}]"
        share = f", {0.5 / ratio['median']:.0%} of the speed of a copy" if copied and name != first else ""
        lines.append(
            f"  {name:<34} {found['microseconds']:>9.2f} us  {ratio['median']:.4f}{interval} of '{first}'{share}"
        )
    lines += [f"  {name:<34} REFUSED: {problem}" for name, problem in result["refused"].items()]
    return "\n".join(lines)


def cases() -> list[tuple[Shape, Callable[[Inputs], list[Candidate]]]]:
    """The comparisons of a run, most valuable first."""
    found: list[tuple[Shape, Callable[[Inputs], list[Candidate]]]] = [(s, triton_candidates) for s in TRITON_SHAPES]
    return found + [(s, make) for s in VENDOR_SHAPES for make in (vendor_candidates, map_candidates)]


def compile_kernels(part: str, device: torch.device) -> int:
    """Runs the variants of a part once, so that Triton has their compiled kernels on disk, and returns their number."""
    shape = replace((VENDOR_SHAPES if part == "vendor" else TRITON_SHAPES)[0], batch=1)
    x = as_models_lay_out(make_inputs(shape, torch.bfloat16, device))
    if part == "vendor":
        found = vendor_candidates(x) + map_candidates(x)
    else:
        found = [c for c in triton_candidates(x) if c.name.startswith(part)]
    for candidate in found:
        candidate.run()
    return len(found)


def compare_all(
    cases: Iterable[tuple[Shape, Callable[[Inputs], Sequence[Candidate]]]],
    device: torch.device,
    seconds: float,
    path: Path | None,
    **content: Any,
) -> int:
    """Compares the candidates of each shape, prints and writes the results, and returns the exit status.

    Args:
        seconds: time of each comparison.
        path: file of the results as JSON; None writes none.
        content: further entries of that file.
    """
    clock = kernel_clock(device)
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for shape, make in cases:
            x = as_models_lay_out(make_inputs(shape, torch.bfloat16, device))
            results.append(compare(shape, make(x), x, clock, Budget(1000, seconds)))
            print(text(results[-1]), flush=True)
            if path is not None:  # after each comparison, in case the run is stopped
                written = {"environment": environment.describe(device), **content, "comparisons": results}
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    refused = sum(len(result["refused"]) for result in results)
    print(f"{refused} variants are refused" if refused else "all variants agree with the reference")
    return int(refused > 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.map_variants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the results as JSON (default: none are written)")
    parser.add_argument("--seconds", type=float, default=8.0, help="time of each comparison (default: 8)")
    parser.add_argument("--compile", choices=PARTS, help="only compile the kernels of a part, for later runs")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"no GPU that torch {torch.__version__} can use (its CUDA version: {torch.version.cuda})")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    device = torch.device("cuda", torch.cuda.current_device())
    if options.compile is not None:
        with torch.no_grad():
            print(f"{options.compile}: {compile_kernels(options.compile, device)} variants have run")
        return 0
    return compare_all(cases(), device, options.seconds, options.out and options.out / "map-variants.json")


if __name__ == "__main__":
    sys.exit(main())
