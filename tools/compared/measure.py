"""Time, memory and exactness of passes with maps, beside the same passes without, in one process and one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing.memory import peak_memory, settle_allocator
from tools.compared import models

Attach = Callable[[bool], AbstractContextManager[Callable[[], list[Tensor]]]]
CPU = torch.device("cpu")


def measure(package: ModuleType, checkout: str, name: str, rounds: int, *, tiny: bool = False) -> dict[str, Any]:
    """Measures a package on a model, in one thread.

    Returns:
        seconds of processor time of each pass, with and without maps in turn; the peak number of bytes that a pass
        with maps allocates above the peak without, and the bytes of the maps that stay; whether the output stays the
        same bit for bit, and its largest difference relative to the largest output; whether maps have a gradient.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(package, checkout, name, rounds, tiny)
    finally:
        torch.set_num_threads(threads)


def _measure(package: ModuleType, checkout: str, name: str, rounds: int, tiny: bool) -> dict[str, Any]:
    settle_allocator(CPU)
    model, inputs = models.make(name, tiny=tiny)
    last: dict[str, Any] = {}

    def plain() -> None:
        last["expected"] = model(**inputs)[0]

    def with_maps() -> None:
        with package.attach(checkout, name, model, False) as maps:
            last["output"] = model(**inputs)[0]
            kept = maps()
            last["bytes_kept"], last["first_map"] = sum(tensor.nbytes for tensor in kept), list(kept[0].shape)

    with torch.no_grad():
        added = peak_memory(with_maps, CPU) - peak_memory(plain, CPU)
        expected, output = last.pop("expected"), last.pop("output")
        seconds: dict[str, list[float]] = {"plain": [], "with_maps": []}
        for _ in range(rounds):
            start = time.thread_time()
            model(**inputs)
            seconds["plain"].append(round(time.thread_time() - start, 4))
            with package.attach(checkout, name, model, False) as maps:
                start = time.thread_time()
                model(**inputs)
                maps()
                seconds["with_maps"].append(round(time.thread_time() - start, 4))
    return {
        "setting": models.SETTINGS[name],
        "seconds": seconds,
        "time_over_plain": round(min(seconds["with_maps"]) / min(seconds["plain"]), 3),
        "peak_bytes_added": added,
        **last,
        "output_identical": torch.equal(output, expected),
        "output_difference": float((output - expected).abs().max() / expected.abs().max()),
        "differentiable": differentiable(package, checkout, name),
    }


def differentiable(package: ModuleType, checkout: str, name: str) -> bool:
    """Whether the maps of a tiny model have a gradient with respect to the latent."""
    model, inputs = models.make(name, tiny=True)
    latent = next(iter(inputs.values())).requires_grad_()
    with package.attach(checkout, name, model, True) as maps:
        model(**inputs)
        found = maps()
    if not all(tensor.requires_grad for tensor in found):
        return False
    total = torch.stack([tensor.square().sum() for tensor in found]).sum()
    (gradient,) = torch.autograd.grad(total, latent)
    return bool(gradient.isfinite().all()) and bool(gradient.any())
