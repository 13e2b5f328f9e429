"""Counters on a device that are zero before a kernel's launch and that the kernel leaves at zero.

The last thread block of a launch to increment such a counter adds up what the other blocks have stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


def zero_counters(device: torch.device, count: int = 1) -> Tensor:
    """At least ``count`` int32 zeros for a launch on the current stream.

    Launches on one stream run one after the other and share one tensor per device and stream. A launch that is
    captured in a CUDA graph may be replayed on any stream, so it has a tensor of its own, which the graph clears.
    """
    if device.type != "cuda":
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
    counters = _counters.get((device, stream))
    if counters is None or counters.numel() < count:
        counters = torch.zeros(1 << (count - 1).bit_length(), dtype=torch.int32, device=device)
        _counters[device, stream] = counters
    return counters
