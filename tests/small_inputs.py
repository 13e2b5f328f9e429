"""A small tensor for every argument of the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels import TokenSelection, attention, flow_sde

TRANSITION = flow_sde(torch.tensor([0.9, 0.8]), 0.5, sigma_max=0.95)
SELECTION = TokenSelection.from_positions([[[1, 2], [4]], [[3], []]])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> dict[str, Tensor]:
    """A small tensor for every argument that accepts a tensor."""
    tensors = {name: numbers(2, 2, 5, 8, seed=i) for i, name in enumerate(("query", "key", "value"))}
    tensors["lse"] = attention(*tensors.values(), SELECTION, return_lse=True, backend="naive").lse
    latents = ("model_output", "old_model_output", "sample", "prev_sample", "noise")
    tensors |= {name: numbers(2, 4, 3, 4, seed=i) for i, name in enumerate(latents)}
    tensors |= {"old_log_prob": numbers(2, 3, 4), "weights": numbers(2, 3, 4).abs(), "mask": numbers(2, 3, 4) < 0.5}
    return tensors | {"advantages": numbers(2), "sigma": torch.tensor([0.9, 0.5]), "step_weights": torch.ones(2)}
