"""Peak memory of a call, and the state of the C allocator before a measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Peak number of bytes in PyTorch's allocator during a call, above the bytes allocated before the call.

    The results of the call, such as a gradient, are included. Memory that compiled code allocates outside PyTorch's
    allocator is not included.
    """
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()  # kept until the profile ends
    del result
    allocated = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def settle_allocator(device: torch.device) -> None:
    """Brings the C allocator into the state that it has in a training process.

    Until the first large tensor is freed, glibc returns every freed tensor of a few MB to the system. The page faults
    of the next allocation would make eager PyTorch several times slower than it is in a trainer.
    """
    if device.type == "cpu":
        torch.zeros(30 << 20, dtype=torch.uint8)
