"""The cost of attention maps: our attention with maps, and other ways to compute the maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.parts.request import Request
from benchmarks.timing.clocks import kernel_clock
from benchmarks.timing.harness import Budget, Variant, interleave
from benchmarks.timing.progress import Progress
from benchmarks.variants.attention import (
    SELECTED,
    TOLERANCES,
    Inputs,
    Shape,
    backend_of,
    bare_variants,
    make_inputs,
    map_error,
    map_kernel,
    map_variants,
    reference,
    shapes_for,
)

ALTERNATIVES = ("lse_difference", "augmented_value", "materialised")


def measure(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one case for each shape and dtype.

    The default dtype is bfloat16 on a GPU and float32 on a CPU: on a CPU without bfloat16 instructions, one call of the
    materialised variant takes seconds. On a GPU, and in a thorough run, the first shape is measured in both dtypes.
    """
    device, dtypes, batch, budget, extent = request
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    both = [torch.float32, torch.bfloat16] if extent == "thorough" or device.type == "cuda" else [usual]
    shapes = shapes_for(device, batch, extent)
    chosen = [(shape, dtype) for n, shape in enumerate(shapes) for dtype in dtypes or (both if n == 0 else [usual])]
    for done, (shape, dtype) in enumerate(chosen):
        limit = budget.for_next(len(chosen) - done)
        yield measure_case(
            shape, dtype, device, limit if shape is shapes[0] else replace(limit, seconds=limit.seconds / 2)
        )


def measure_case(shape: Shape, dtype: torch.dtype, device: torch.device, budget: Budget) -> dict[str, Any]:
    inputs = make_inputs(shape, dtype, device)
    name = str(dtype).removeprefix("torch.")
    title = f"attention · {shape.name} · {name}"
    with torch.no_grad():
        with_maps, bare = map_variants(inputs), bare_variants(inputs)
        errors = check_maps(inputs, with_maps, title)  # also warms up every variant with maps
        variants = [*bare, *with_maps, map_kernel(inputs)]
        clock = kernel_clock(device)
        times = interleave(variants, clock, budget, title, warm_up=0 if device.type == "cpu" else 3)
    floor = times.fastest([v.name for v in bare if v.name.startswith("sdpa")])
    without = "ours_without" if "ours_without" in times.names else "sdpa"
    labels = {v.name: v.label for v in variants}
    same = " (PyTorch's SDPA)" if without == "sdpa" else ""
    kernel = floor.removeprefix("sdpa").replace("_", ", ")
    ratios = {
        "overhead": (f"OVERHEAD ours with maps / without{same}", "ours", without),
        "distance_to_floor": (f"FLOOR    ours with maps / fastest SDPA{kernel}", "ours", floor),
        "map_kernel_share": ("cross-check: only our map kernel / SDPA", "map_kernel", "sdpa"),
        **{f"{other}_over_ours": (f"{labels[other]} / ours with maps", other, "ours") for other in ALTERNATIVES},
    }
    columns = times.columns(variants, "sdpa")
    for variant, row in columns["times"].items():
        row["map_error"] = errors.get(variant)
    return {
        "name": shape.name,
        "batch": shape.batch,
        "title": f"{shape}, {name}",
        "shape": asdict(shape),
        "selected_tokens": SELECTED,
        "dtype": name,
        "backend": backend_of(inputs),
        "clock": clock.name,
        **columns,
        "ratios": times.ratios(ratios),
        "notes": [
            f"backend: {backend_of(inputs)}; {SELECTED} selected tokens",
            *filter(None, (shape.note, times.note)),
        ],
    }


def check_maps(inputs: Inputs, variants: list[Variant], title: str) -> dict[str, float]:
    """Returns the error of each variant's maps against the reference implementation.

    Raises:
        RuntimeError: if the error of a variant exceeds the tolerance.
    """
    errors = {}
    tolerance = TOLERANCES[inputs.query.dtype]
    with Progress(f"{title} · checking", 0) as progress:
        progress.show("reference implementation")
        expected = reference(inputs)
        for variant in variants:
            progress.show(variant.label)
            errors[variant.name] = map_error(variant.run()[1], expected)
            if not errors[variant.name] <= tolerance:
                raise RuntimeError(
                    f"{title}: the maps of '{variant.label}' differ from the reference implementation by "
                    f"{errors[variant.name]:.2e} (relative RMS), more than {tolerance:.0e}"
                )
    return errors
