"""What the capture of maps costs a transformer's forward pass: time, and peak memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.parts.policy import peak_memory
from benchmarks.timing.clocks import kernel_clock
from benchmarks.timing.harness import Budget, Extent, Variant, interleave
from benchmarks.timing.progress import Progress
from benchmarks.variants.sd3_model import CHANNELS, POOLED_WIDTH, TEXT_WIDTH, Size, build
from star_kernels import TokenSelection
from star_kernels.capture import capture_maps

SELECTED = 8
SAMPLES = 1  # and their unconditional halves
SIZES = {
    "cpu": Size(blocks=2, latent=128, text=333, groups=1, group=1, steps=1),
    "cuda": Size(blocks=24, latent=128, text=333, groups=1, group=1, steps=1),
}
SHORT = Size(blocks=1, latent=64, text=333, groups=1, group=1, steps=1)  # on a CPU, unless the run is thorough
QUICK = Size(blocks=1, latent=16, text=32, groups=1, group=1, steps=1)
# Relative RMS between a forward pass with capture and one without: other sums, through the model's dtype.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def measure(
    device: torch.device, dtypes: list[torch.dtype] | None, batch: int | None, budget: Budget, extent: Extent
) -> Iterator[dict[str, Any]]:
    size = SHORT if extent == "default" and device.type == "cpu" else SIZES[device.type]
    if extent == "quick":
        size = QUICK
    dtype = (dtypes or [torch.bfloat16 if device.type == "cuda" else torch.float32])[0]
    yield measure_case(replace(size, group=batch or SAMPLES), dtype, device, budget, extent == "quick")


@torch.no_grad()
def measure_case(size: Size, dtype: torch.dtype, device: torch.device, budget: Budget, quick: bool) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    title = f"capture · SD3.5-M {8 * size.latent}² · {name}"
    with Progress(f"{title} · building", 0):
        forward = Forward(size, dtype, device)
        plain, captured = forward.plain(), forward.captured()
    difference = float((captured.float() - plain.float()).norm() / plain.float().norm())
    if not difference <= TOLERANCES[dtype]:
        raise RuntimeError(f"{title}: capture changes the output by {difference:.1e} (relative RMS)")
    variants = [
        Variant("plain", "transformer forward", forward.plain),
        Variant("captured", "transformer forward with capture", forward.captured),
    ]
    clock = kernel_clock(device)
    with Progress(f"{title} · memory", 0):
        memory = peak_memory(forward.captured, device) / peak_memory(forward.plain, device)
    times = interleave(variants, clock, budget, title, warm_up=0)
    label = "capture / no capture"
    return {
        "name": "smoke test" if quick else f"SD3.5-M {8 * size.latent}² forward",
        "title": f"SD3.5-M, {size.blocks} of 24 blocks, {8 * size.latent}², {size.text} text tokens, {name}, "
        f"batch {2 * size.batch} with its unconditional half",
        "size": asdict(size),
        "selected_tokens": SELECTED,
        "dtype": name,
        "clock": clock.name,
        **times.columns(variants, "plain"),
        "ratios": {
            "capture_over_plain": {"label": f"OVERHEAD {label}", **times.ratio("captured", "plain").as_dict()},
            "capture_memory": {"label": f"peak memory beyond weights and inputs: {label}", "median": memory},
        },
        "output_difference": difference,
        "notes": [*filter(None, (times.note,))],
    }


class Forward:
    """A transformer and the inputs of one step, with classifier-free guidance."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        self.transformer = build(size, dtype, device)
        generator = torch.Generator().manual_seed(0)
        batch = 2 * size.batch

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.inputs = {
            "hidden_states": normal(batch, CHANNELS, size.latent, size.latent),
            "encoder_hidden_states": normal(batch, size.text, TEXT_WIDTH),
            "pooled_projections": normal(batch, POOLED_WIDTH),
            "timestep": torch.full((batch,), 500.0, device=device),
        }
        chosen = torch.randperm(size.text, generator=generator)[:SELECTED].tolist()
        positions = [[size.image + t for t in chosen] for _ in range(size.batch)]
        self.selection = TokenSelection.from_positions(positions).to(device)

    def plain(self) -> Tensor:
        output: Tensor = self.transformer(**self.inputs, return_dict=False)[0]
        return output

    def captured(self) -> Tensor:
        with capture_maps(self.transformer, self.selection, cfg="last") as maps:
            output = self.plain()
        maps.value.sum()  # a user reads them
        return output
