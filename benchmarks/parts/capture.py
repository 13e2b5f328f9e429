"""The cost of capturing maps of the default blocks in a transformer's forward pass: time and peak memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.parts.request import Request
from benchmarks.timing.clocks import kernel_clock
from benchmarks.timing.harness import Budget, Variant, interleave
from benchmarks.timing.memory import peak_memory
from benchmarks.timing.progress import Progress
from benchmarks.variants.sd3_model import CHANNELS, POOLED_WIDTH, TEXT_WIDTH, Size, build
from star_kernels import TokenSelection
from star_kernels.capture import capture_maps

SELECTED = 8
SAMPLES = 1  # plus the unconditional half of the batch
SIZES = {
    "cpu": (Size(blocks=2, latent=128, text=333, groups=1, group=1, steps=1),),
    "cuda": tuple(Size(blocks=24, latent=latent, text=333, groups=1, group=1, steps=1) for latent in (64, 128)),
}
SHORT = Size(blocks=1, latent=64, text=333, groups=1, group=1, steps=1)  # default run on a CPU
QUICK = Size(blocks=1, latent=16, text=32, groups=1, group=1, steps=1)
LABEL = "with capture / without"
# Relative RMS difference allowed between the outputs with and without capture, which sum in another order.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def measure(request: Request) -> Iterator[dict[str, Any]]:
    """Yields a case for each size, in the dtype of the request."""
    sizes = sizes_for(request)
    for done, size in enumerate(sizes):
        budget = request.budget.for_next(len(sizes) - done)
        yield measure_case(size, request.dtype, request.device, budget, request.extent == "quick")


def sizes_for(request: Request) -> list[Size]:
    sizes: tuple[Size, ...] = SIZES[request.device.type]
    if request.extent == "quick":
        sizes = (QUICK,)
    elif request.extent == "default" and request.device.type == "cpu":
        sizes = (SHORT,)
    return [replace(size, group=request.batch or SAMPLES) for size in sizes]


@torch.no_grad()
def measure_case(size: Size, dtype: torch.dtype, device: torch.device, budget: Budget, quick: bool) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    title = f"capture · SD3.5-M {8 * size.latent}² · {name}"
    with Progress(f"{title} · building", 0):
        forward = Forward(size, dtype, device)
        plain, captured = forward.plain(), forward.captured()
    difference = output_difference(captured, plain, title)
    variants = [
        Variant("plain", "transformer forward", forward.plain),
        Variant("captured", "transformer forward with capture", forward.captured),
    ]
    ratios = {"capture_over_plain": (f"OVERHEAD {LABEL}", "captured", "plain")}
    if size.blocks == 24:
        variants.append(Variant("captured_all", "the same with all blocks captured", partial(forward.captured, "all")))
        ratios["capture_of_all_over_plain"] = (f"all blocks: {LABEL}", "captured_all", "plain")
    clock = kernel_clock(device)
    with Progress(f"{title} · memory", 0):
        memory = peak_memory(forward.captured, device) / peak_memory(forward.plain, device)
    times = interleave(variants, clock, budget, title, warm_up=0)
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
            **times.ratios(ratios),
            "capture_memory": {"label": f"peak extra memory: {LABEL}", "median": memory},
        },
        "output_difference": difference,
        "notes": [*filter(None, (times.note,))],
    }


def output_difference(captured: Tensor, plain: Tensor, title: str) -> float:
    """The relative RMS difference of two outputs.

    Raises:
        RuntimeError: if it is too large.
    """
    difference = float((captured.float() - plain.float()).norm() / plain.float().norm())
    if not difference <= TOLERANCES[plain.dtype]:
        raise RuntimeError(f"{title}: capture changes the output by {difference:.1e} (relative RMS)")
    return difference


class Forward:
    """A transformer and its inputs for one denoising step with classifier-free guidance."""

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
        self.selection = TokenSelection.from_positions([chosen] * size.batch).to(device)

    def plain(self) -> Tensor:
        output: Tensor = self.transformer(**self.inputs, return_dict=False)[0]
        return output

    def captured(self, blocks: str = "default") -> Tensor:
        with capture_maps(self.transformer, self.selection, blocks=blocks, cfg="last") as maps:
            output = self.plain()
        maps.value.sum()  # reading the maps is part of the cost
        return output
