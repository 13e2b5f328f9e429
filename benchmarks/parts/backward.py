"""The backward pass of attention: with detached maps, as in a capture, and PyTorch's; on a GPU also that of our kernel,
with and without a gradient of the maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.parts.request import Request
from benchmarks.timing.clocks import kernel_clock
from benchmarks.timing.harness import Budget, Variant, interleave
from benchmarks.variants.attention import FLUX_1024, SD35_512, SD35_1024, VENDORS, Inputs, Shape, make_inputs
from star_kernels import attention

SHAPES = ((SD35_512, 16), (SD35_1024, 4), (FLUX_1024, 2))
CPU_SHAPES = (
    (replace(SD35_512, heads=4), 1),
    (replace(FLUX_1024, name="FLUX 512²", heads=2, image=1024), 1),
)
# Relative RMS difference allowed between two backward passes in a 16-bit dtype.
TOLERANCE = 3e-2


def measure(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one case for each shape and dtype."""
    device, dtypes, batch, budget, extent = request
    on_gpu = device.type == "cuda"
    shapes = [replace(shape, batch=batch or b) for shape, b in (SHAPES if on_gpu else CPU_SHAPES)]
    if extent == "quick":
        shapes = [replace(SD35_512, name="smoke test", heads=2) if on_gpu else Shape("smoke test", 1, 2, 64, 256, 77)]
    usual = torch.bfloat16 if on_gpu else torch.float32
    cases = [(shape, dtype) for shape in shapes for dtype in dtypes or [usual]]
    for done, (shape, dtype) in enumerate(cases):
        yield measure_case(shape, dtype, device, budget.for_next(len(cases) - done))


def measure_case(shape: Shape, dtype: torch.dtype, device: torch.device, budget: Budget) -> dict[str, Any]:
    inputs = make_inputs(shape, dtype, device)
    found = variants(inputs)
    name = str(dtype).removeprefix("torch.")
    title = f"attention backward · {shape.name} · {name}"
    clock = kernel_clock(device)
    times = interleave(found, clock, budget, title, warm_up=3)
    ratios = {"detached_over_sdpa": ("DETACHED with detached maps / PyTorch SDPA", "detached", "sdpa")}
    if "ours" in times.names:
        flash = "flash" if "flash" in times.names else "sdpa"
        fastest = times.fastest([v.name for v in found if v.name in ("sdpa", *VENDORS)])
        labels = {v.name: v.label for v in found}
        ratios |= {
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
        "ratios": times.ratios(ratios),
        "notes": [*filter(None, (times.note,))],
    }


def variants(x: Inputs) -> list[Variant]:
    """The backward passes to compare. Each runs through a graph that is built once and retained."""
    leaves = [t.detach().requires_grad_() for t in (x.query, x.key, x.value)]
    upstream = torch.randn_like(x.query)
    upstream_maps: list[Tensor] = []

    def through(*outputs: Tensor) -> tuple[Tensor, ...]:
        gradients = [upstream, *upstream_maps][: len(outputs)]
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    sdpa = F.scaled_dot_product_attention(*leaves)
    detached = attention(*leaves, x.selection, rows=x.shape.rows, detach_maps=True).out
    found = [
        Variant("sdpa", "PyTorch SDPA", lambda: through(sdpa)),
        Variant("detached", "with detached maps", lambda: through(detached)),
    ]
    if x.query.is_cuda:
        ours = attention(*leaves, x.selection, rows=x.shape.rows, backend="triton")
        upstream_maps.append(torch.randn_like(ours.maps))
        found += [
            Variant("ours", "ours", lambda: through(ours.out)),
            Variant("ours_maps", "ours, with a gradient of the maps", lambda: through(ours.out, ours.maps)),
        ]
    expected = through(sdpa)
    for variant in found[1:]:
        if variant.name != "ours_maps":
            _check(variant, expected)
    if not x.query.is_cuda:
        return found
    for name, backend in VENDORS.items():
        out = _with(backend, leaves)
        if out is not None:
            found.append(Variant(name, f"PyTorch SDPA ({name})", lambda out=out: through(out)))
    return found


def _check(variant: Variant, expected: tuple[Tensor, ...]) -> None:
    for got, want in zip(variant.run(), expected, strict=True):
        error = float((got.float() - want.float()).norm() / want.float().norm())
        if not error <= TOLERANCE:
            raise RuntimeError(
                f"the gradients of '{variant.label}' differ from PyTorch's by {error:.2e} (relative RMS)"
            )


def _with(backend: SDPBackend, leaves: list[Tensor]) -> Tensor | None:
    try:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*leaves)
    except RuntimeError:  # PyTorch has no such kernel for this dtype or device
        return None
