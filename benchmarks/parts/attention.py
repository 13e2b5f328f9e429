"""Part (a): what the maps cost in attention, and what they cost by other ways."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.timing.clocks import kernel_clock
from benchmarks.timing.harness import Budget, Extent, Variant, interleave
from benchmarks.timing.progress import Progress
from benchmarks.variants.attention import (
    SELECTED,
    TOLERANCES,
    Inputs,
    Shape,
    backend_of,
    bare_variants,
    definition,
    make_inputs,
    map_error,
    map_kernel,
    map_variants,
    shapes_for,
)

ALTERNATIVES = ("lse_difference", "augmented_value", "materialised")


def measure(
    device: torch.device, dtypes: list[torch.dtype] | None, batch: int | None, budget: Budget, extent: Extent
) -> Iterator[dict[str, Any]]:
    """One case for each shape and dtype.

    The usual dtype is the one that the device is used with: without bfloat16 instructions one call of the materialised
    way takes seconds on a CPU. A thorough run has the first shape in both.
    """
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    both = [torch.float32, torch.bfloat16] if extent == "thorough" or device.type == "cuda" else [usual]
    shapes = shapes_for(device, batch, extent)
    chosen = [(shape, dtype) for n, shape in enumerate(shapes) for dtype in dtypes or (both if n == 0 else [usual])]
    for done, (shape, dtype) in enumerate(chosen):
        limit = budget.for_one(len(chosen) - done)
        yield measure_case(
            shape, dtype, device, limit if shape is shapes[0] else replace(limit, seconds=limit.seconds / 2)
        )


def measure_case(shape: Shape, dtype: torch.dtype, device: torch.device, budget: Budget) -> dict[str, Any]:
    inputs = make_inputs(shape, dtype, device)
    name = str(dtype).removeprefix("torch.")
    title = f"attention · {shape.name} · {name}"
    with torch.no_grad():
        with_maps, bare = map_variants(inputs), bare_variants(inputs)
        errors = check_maps(inputs, with_maps, title)  # also the first call of each, so that slow ones need no warm-up
        variants = [*bare, *with_maps, map_kernel(inputs)]
        clock = kernel_clock(device)
        times = interleave(variants, clock, budget, title, warm_up=0 if device.type == "cpu" else 3)
    floor = times.fastest([v.name for v in bare if v.name.startswith("sdpa")])
    without = "ours_without" if "ours_without" in times.names else "sdpa"
    labels = {v.name: v.label for v in variants}
    same = " (SDPA itself)" if without == "sdpa" else ""
    kernel = floor.removeprefix("sdpa").replace("_", ", ")
    ratios = {
        "overhead": (f"OVERHEAD ours with maps / without{same}", "ours", without),
        "distance_to_floor": (f"FLOOR    ours with maps / fastest SDPA{kernel}", "ours", floor),
        "map_kernel_share": ("cross-check: our map kernel alone / SDPA", "map_kernel", "sdpa"),
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
        "ratios": {key: {"label": label, **times.ratio(a, b).as_dict()} for key, (label, a, b) in ratios.items()},
        "notes": [
            f"backend: {backend_of(inputs)}; {SELECTED} selected tokens",
            *filter(None, (shape.note, times.note)),
        ],
    }


def check_maps(inputs: Inputs, variants: list[Variant], title: str) -> dict[str, float]:
    """The error of each variant's maps against the definition; one that is wrong is not worth timing."""
    errors = {}
    tolerance = TOLERANCES[inputs.query.dtype]
    with Progress(f"{title} · checking", 0) as progress:
        progress.show("definition")
        expected = definition(inputs)
        for variant in variants:
            progress.show(variant.label)
            errors[variant.name] = map_error(variant.run()[1], expected)
            if not errors[variant.name] <= tolerance:
                raise RuntimeError(
                    f"{title}: the maps of '{variant.label}' differ from the definition by {errors[variant.name]:.2e} "
                    f"(relative RMS), more than {tolerance:.0e}"
                )
    return errors
