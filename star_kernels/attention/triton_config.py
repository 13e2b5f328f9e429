"""Tile and launch parameters of the Triton kernels, by architecture, head dim and dtype; nothing is tuned at run time.

How the defaults follow from the hardware. A program keeps query rows and accumulators in registers and streams the rest
through shared memory, so it wants the largest tile that does not spill; two resident programs on a multiprocessor hide
one another's softmax behind matrix products, so 8 warps are held to 128 registers and 4 warps to 168 where they fit.
With warp-group products (sm_90, sm_100) operands stay in shared memory; on sm_80 they take registers, and tiles shrink.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one step, warps, depth of the load pipeline, and a limit on registers of a thread."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        """Options of a Triton launch; fused multiply-adds are said to be wanted, as versions differ in their default."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


@dataclass(frozen=True)
class BackwardConfig:
    """The two launches of the backward pass: one owns rows of queries, the other rows of keys.

    The first prepares rows for the second, as many as whole tiles hold: its ``block_m`` is a multiple of the other's.
    """

    query: Tile
    key_value: Tile


@dataclass(frozen=True)
class Config:
    """All kernels of one architecture and head dim."""

    forward: Tile
    query: Tile
    key_value: Tile


_CONFIGS = {
    "sm_80": {  # at most 99 KiB of shared memory, so that sm_86, sm_89 and sm_120 can run them
        32: Config(Tile(128, 64, 8, 3, 128), Tile(64, 32, 4, 3, 120), Tile(32, 64, 4, 3, 152)),
        64: Config(Tile(128, 32, 4, 3, 168), Tile(64, 32, 4, 3, 168), Tile(32, 128, 8, 3, 224)),
        128: Config(Tile(128, 32, 8, 3), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2, 176)),
        256: Config(Tile(32, 32, 4, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    "sm_90": {
        32: Config(Tile(128, 64, 4, 3, 168), Tile(128, 64, 8, 3, 128), Tile(64, 64, 4, 3, 168)),
        64: Config(Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128), Tile(64, 128, 8, 3, 240)),
        128: Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        256: Config(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)),
    },
    "sm_100": {
        32: Config(Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128), Tile(64, 64, 4, 3, 192)),
        64: Config(Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128), Tile(64, 64, 4, 3, 208)),
        128: Config(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        256: Config(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 1)),
    },
    "gfx9": {  # 64 KiB of local memory, no limit on registers to set
        32: Config(Tile(128, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
        64: Config(Tile(128, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
        128: Config(Tile(128, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
        256: Config(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    },
}
_FLOAT32 = Tile(32, 32, 8, 1)  # products without tensor cores, in full float32
_CAPS_WITH_MASK = ("sm_90",)  # elsewhere the mask's registers break the limit, and a spill costs more than a neighbour


def architecture(device: torch.device) -> str:
    """The family of configurations for a device; the interpreter on a CPU takes that of the smallest GPU."""
    if device.type != "cuda":
        return "sm_80"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _architecture(device: int) -> str:
    if torch.version.hip is not None:
        return "gfx9"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@cache
def forward_config(architecture: str, head_dim: int, dtype: torch.dtype, masked: bool = False) -> Tile:
    """The tile of the forward kernel; ``masked`` where a key mask is given.

    Raises:
        ValueError: a head dim above 256.
    """
    return _adapt(_find(architecture, head_dim).forward, architecture, dtype, masked)


@cache
def backward_config(architecture: str, head_dim: int, dtype: torch.dtype, masked: bool = False) -> BackwardConfig:
    """The tiles of the backward kernels; ``masked`` where a key mask is given.

    Raises:
        ValueError: a head dim above 256.
    """
    config = _find(architecture, head_dim)
    return BackwardConfig(
        _adapt(config.query, architecture, dtype, masked), _adapt(config.key_value, architecture, dtype, masked)
    )


def maps_config(head_dim: int) -> Tile:
    """The tile of the kernel that takes maps from a log-sum-exp: small, since it only waits for memory."""
    return Tile(64 if head_dim <= 128 else 32, 16, 4, 1)


def _find(architecture: str, head_dim: int) -> Config:
    for width, config in _CONFIGS[architecture].items():
        if head_dim <= width:
            return config
    raise ValueError(f"head_dim must be at most 256 for the Triton kernels, got {head_dim}")


def _adapt(tile: Tile, architecture: str, dtype: torch.dtype, masked: bool) -> Tile:
    if dtype == torch.float32:
        return _FLOAT32
    return replace(tile, max_registers=None) if masked and architecture not in _CAPS_WITH_MASK else tile
