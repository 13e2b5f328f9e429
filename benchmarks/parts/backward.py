"""The backward pass of attention on a GPU: ours, without and with a gradient of the maps, and PyTorch's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing.clocks import kernel_clock
from benchmarks.timing.harness import Budget, Extent, Variant, interleave
from benchmarks.variants.attention import FLUX_1024, SD35_512, SD35_1024, VENDORS, Inputs, Shape, make_inputs
from star_kernels import attention

SHAPES = ((SD35_512, 16), (SD35_1024, 4), (FLUX_1024, 2))
# Relative RMS between two backward passes in 16 bits, each rounded on its way.
TOLERANCE = 3e-2


def measure(
    device: torch.device, dtypes: list[torch.dtype] | None, batch: int | None, budget: Budget, extent: Extent
) -> Iterator[dict[str, Any]]:
    if device.type != "cuda":  # PyTorch's own backward pass there
        return
    shapes = [replace(shape, batch=batch or b) for shape, b in SHAPES]
    if extent == "quick":
        shapes = [replace(SD35_512, name="smoke test", heads=2)]
    cases = [(shape, dtype) for shape in shapes for dtype in dtypes or [torch.bfloat16]]
    for done, (shape, dtype) in enumerate(cases):
        yield measure_case(shape, dtype, device, budget.for_one(len(cases) - done))


def measure_case(shape: Shape, dtype: torch.dtype, device: torch.device, budget: Budget) -> dict[str, Any]:
    inputs = make_inputs(shape, dtype, device)
    found = variants(inputs)
    name = str(dtype).removeprefix("torch.")
    title = f"attention backward · {shape.name} · {name}"
    clock = kernel_clock(device)
    times = interleave(found, clock, budget, title, warm_up=3)
    flash = "flash" if "flash" in times.names else "sdpa"
    fastest = times.fastest([v.name for v in found if not v.name.startswith("ours")])
    labels = {v.name: v.label for v in found}
    ratios = {
        "backward_over_flash": (f"BACKWARD ours / {labels[flash]}", "ours", flash),
        "backward_over_fastest": (f"FLOOR    ours / fastest, {labels[fastest]}", "ours", fastest),
        "map_gradient_overhead": ("OVERHEAD ours with map gradient / without", "ours_maps", "ours"),
    }
    return {
        "name": shape.name,
        "batch": shape.batch,
        "title": f"{shape}, {name}, backward pass",
        "shape": asdict(shape),
        "dtype": name,
        "clock": clock.name,
        **times.columns(found, "sdpa"),
        "ratios": {key: {"label": label, **times.ratio(a, b).as_dict()} for key, (label, a, b) in ratios.items()},
        "notes": [*filter(None, (times.note,))],
    }


def variants(x: Inputs) -> list[Variant]:
    """Each a backward pass through a graph that its forward pass has left."""
    leaves = [t.detach().requires_grad_() for t in (x.query, x.key, x.value)]
    upstream = torch.randn_like(x.query)
    ours = attention(*leaves, x.selection, rows=x.shape.rows, backend="triton")
    upstream_maps = torch.randn_like(ours.maps)

    def through(*outputs: Tensor) -> tuple[Tensor, ...]:
        gradients = [upstream, upstream_maps][: len(outputs)]
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    sdpa = F.scaled_dot_product_attention(*leaves)
    expected = through(sdpa)
    found = [
        Variant("sdpa", "PyTorch SDPA", lambda: through(sdpa)),
        Variant("ours", "ours", lambda: through(ours.out)),
        Variant("ours_maps", "ours, with a gradient of the maps", lambda: through(ours.out, ours.maps)),
    ]
    for got, want in zip(through(ours.out), expected, strict=True):
        error = float((got.float() - want.float()).norm() / want.float().norm())
        if not error <= TOLERANCE:
            raise RuntimeError(f"our gradients differ from PyTorch's by {error:.2e} (relative RMS)")
    for name, backend in VENDORS.items():
        out = _with(backend, leaves)
        if out is not None:
            found.append(Variant(name, f"PyTorch SDPA ({name})", lambda out=out: through(out)))
    return found


def _with(backend: SDPBackend, leaves: list[Tensor]) -> Tensor | None:
    try:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*leaves)
    except RuntimeError:  # PyTorch has no such kernel for this dtype or device
        return None
