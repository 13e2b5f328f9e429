"""Tile and launch parameters of the Triton kernels: what fits the registers and shared memory of an architecture."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the score tile of one program step, its warps, and the depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


@dataclass(frozen=True)
class BackwardConfig:
    """The two launches of the backward pass. ``block_m`` counts queries and ``block_n`` keys in both."""

    query: Tile
    key_value: Tile


def architecture(device):
    return "cpu"


def forward_config(a, d, t):
    return Tile(32, 32, 4, 1)


def maps_config(a, d, t):
    return Tile(32, 32, 4, 1)


def backward_config(a, d, t):
    return BackwardConfig(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
