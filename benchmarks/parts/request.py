"""The arguments that every part of the benchmark takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.timing.harness import Budget, Extent


class Request(NamedTuple):
    """What to measure, where, and for how long. None selects the default of the part."""

    device: torch.device
    dtypes: list[torch.dtype] | None
    batch: int | None
    budget: Budget
    extent: Extent

    @property
    def dtype(self) -> torch.dtype:
        """The first requested dtype. Default: bfloat16 on a GPU, float32 on a CPU."""
        if self.dtypes:
            return self.dtypes[0]
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32
