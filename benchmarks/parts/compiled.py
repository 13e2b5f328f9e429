"""The cost of maps in a compiled transformer, beside the same in eager mode: a forward pass and a training step.

Blocks are compiled one by one, which takes less time than compiling the whole model. On a GPU the forward pass is also
measured with CUDA graphs (``mode="reduce-overhead"``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from benchmarks.parts.capture import LABEL, Forward, output_difference, sizes_for
from benchmarks.parts.end_to_end import PLAIN, STAR, Counted, Trainer
from benchmarks.parts.request import Request
from benchmarks.timing.clocks import CpuClock, kernel_clock
from benchmarks.timing.harness import Budget, Variant, interleave
from benchmarks.timing.progress import Progress
from benchmarks.variants.sd3_model import Size, size_for

EAGER, COMPILED, GRAPHS = "eager", "compiled", "graphs"


class Blocks:
    """The blocks of a transformer in eager mode, compiled, and compiled with CUDA graphs."""

    def __init__(self, transformer: Any, *modes: str) -> None:
        torch._dynamo.config.recompile_limit = 64  # kinds of blocks, with and without maps and gradients, in each mode
        self.transformer = transformer
        original = transformer.transformer_blocks
        options: dict[str, dict[str, Any]] = {COMPILED: {}, GRAPHS: {"mode": "reduce-overhead"}}
        self.modes = {EAGER: original}
        for mode in modes:
            self.modes[mode] = nn.ModuleList(torch.compile(block, **options[mode]) for block in original)

    def run(self, mode: str, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The function, with the blocks of a mode."""

        def run() -> Tensor:
            self.transformer.transformer_blocks = self.modes[mode]
            if mode == GRAPHS:
                torch.compiler.cudagraph_mark_step_begin()
            return function()

        return run


def measure(request: Request, *, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Yields a case for each size of the forward pass, and one for the step, in the dtype of the request."""
    sizes = sizes_for(request)
    for done, size in enumerate(sizes):
        yield measure_forward(request, size, request.budget.for_next(len(sizes) - done + 1))
    size = size_for(request.device, request.batch, request.extent)
    trainer = Trainer(size, request.dtype, request.device, prompts, tokenizer)
    yield measure_step(request, size, trainer)


@torch.no_grad()
def measure_forward(request: Request, size: Size, budget: Budget) -> dict[str, Any]:
    name, device = str(request.dtype).removeprefix("torch."), request.device
    title = f"compiled · SD3.5-M {8 * size.latent}² · {name}"
    modes = [EAGER, COMPILED, *([GRAPHS] if device.type == "cuda" else [])]
    variants, ratios, differences = [], {}, {}
    with Progress(f"{title} · compiling", 0) as progress:
        forward = Forward(size, request.dtype, device)
        blocks = Blocks(forward.transformer, *modes[1:])
        for mode in modes:
            progress.show(mode)
            plain, captured = blocks.run(mode, forward.plain), blocks.run(mode, forward.captured)
            differences[mode] = output_difference(captured(), plain(), f"{title}, {mode}")
            variants += [
                Variant(mode, f"transformer forward, {mode}", plain),
                Variant(f"{mode}_captured", "the same with capture", captured),
            ]
            ratios[f"{mode}_capture_over_plain"] = (f"OVERHEAD {mode}: {LABEL}", f"{mode}_captured", mode)
            if mode != EAGER:
                ratios[f"{mode}_over_eager"] = (f"{mode} / {EAGER}, without capture", mode, EAGER)
    clock = kernel_clock(device)
    times = interleave(variants, clock, budget, title, warm_up=2)
    return {
        "name": "smoke test" if request.extent == "quick" else f"SD3.5-M {8 * size.latent}² forward",
        "title": f"SD3.5-M, {size.blocks} of 24 blocks, {8 * size.latent}², {size.text} text tokens, {name}, "
        f"batch {2 * size.batch} with its unconditional half, eager and compiled",
        "size": asdict(size),
        "dtype": name,
        "clock": clock.name,
        **times.columns(variants, EAGER),
        "ratios": times.ratios(ratios),
        "output_differences": differences,
        "notes": [*filter(None, (times.note,))],
    }


def measure_step(request: Request, size: Size, trainer: Trainer) -> dict[str, Any]:
    name, title = str(request.dtype).removeprefix("torch."), "compiled · step"
    blocks = Blocks(trainer.transformer, COMPILED)
    variants, ratios = [], {}
    for mode in (EAGER, COMPILED):
        names = {arm: f"{mode}_{arm.name}" for arm in (PLAIN, STAR)}
        variants += [
            Variant(names[arm], f"{arm.label}, {mode}", blocks.run(mode, Counted(trainer, arm))) for arm in names
        ]
        ratios[f"{mode}_star_over_plain"] = (f"OVERHEAD {mode}: STAR / plain Flow-GRPO", names[STAR], names[PLAIN])
    ratios["compiled_over_eager"] = (f"{COMPILED} / {EAGER}, plain Flow-GRPO", "compiled_plain", "eager_plain")
    clock = CpuClock(request.device)
    times = interleave(variants, clock, request.budget, title, warm_up=1)
    return {
        "name": "smoke test" if request.extent == "quick" else "SD3.5-M step",
        "title": f"SD3.5-M, {size.blocks} of 24 blocks, {8 * size.latent}², {size.text} text tokens, {name}, "
        f"{size.batch} samples, {size.steps} steps, CFG, eager and compiled",
        "size": asdict(size),
        "dtype": name,
        "clock": clock.name,
        **times.columns(variants, "eager_plain"),
        "ratios": times.ratios(ratios),
        "notes": [*filter(None, (times.note,))],
    }
