"""Tile and launch parameters of the Triton kernels, by architecture, head dim and dtype; nothing is tuned at run time.

How the defaults follow from the hardware: a program keeps query rows and accumulators in registers and streams keys and
values through shared memory, so the largest tile that does not spill is the fastest. Two programs resident on a
multiprocessor overlap the softmax of one with the matrix products of the other, so 8 warps are limited to 128 registers
and 4 warps to 168 if the kernel fits. Other limits keep the compiler from using more registers with maps than without.
With warp-group products (sm_90, sm_100) operands stay in shared memory; on sm_80 they use registers, and tiles are
smaller. tests/attention/test_triton_compile.py checks registers and occupancy;
python -m tools.compile_report prints them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch


@dataclass(frozen=True)
class Tile:
    """Queries and keys in one step, warps, stages of the load pipeline, and a limit on the registers of a thread.

    With ``descriptors`` the forward kernel loads its tiles through tensor descriptors (docs/hopper.md); slower on an
    H200.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    descriptors: bool = False

    @property
    def launch(self) -> dict[str, int]:
        """Options of a Triton launch. Fused multiply-adds are explicit, as their default differs between versions."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


@dataclass(frozen=True)
class BackwardConfig:
    """The two launches of the backward pass: one over tiles of queries, the other over tiles of keys."""

    query: Tile
    key_value: Tile


@dataclass(frozen=True)
class Config:
    """The kernels of one architecture and head dim."""

    forward: Tile
    query: Tile
    key_value: Tile


def _triton() -> tuple[int, ...]:
    """Major and minor version of triton, which this file does not import."""
    try:
        return tuple(int(number) for number in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return (0, 0)


_SINCE_3_9 = _triton() >= (3, 9)
_QUERY_128 = Tile(128, 64, 8, 2, 200 if _SINCE_3_9 else 192)  # newer compilers use more, with and without maps

_CONFIGS = {  # by the largest head dim of a line; tiles are as wide as the next power of two
    "sm_80": {  # at most 99 KiB of shared memory, so that sm_86, sm_89 and sm_120 can run them
        32: Config(Tile(128, 64, 8, 3, 120), Tile(64, 32, 4, 3, 120), Tile(32, 64, 4, 3, 128)),
        64: Config(Tile(128, 32, 4, 3, 168), Tile(64, 32, 4, 3, 168), Tile(32, 128, 8, 3, 200)),
        128: Config(Tile(128, 32, 8, 3), Tile(128, 32, 8, 2, 208), Tile(32, 64, 8, 2)),
    },
    "sm_90": {
        32: Config(Tile(128, 64, 4, 3, 168), Tile(128, 64, 8, 3, 120), Tile(64, 64, 4, 3)),
        64: Config(Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128), Tile(64, 64, 4, 3)),
        127: Config(Tile(128, 64, 8, 3), _QUERY_128, Tile(32, 128, 8, 2, 216)),  # masks of the padding use registers
        128: Config(Tile(128, 64, 8, 3), _QUERY_128, Tile(64, 128, 8, 2)),
    },
    "sm_100": {
        32: Config(Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128), Tile(64, 64, 4, 3, 128)),
        64: Config(Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 3, 128), Tile(64, 64, 4, 3, 144)),
        127: Config(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2, 248), Tile(64, 128, 8, 2, 160)),
        128: Config(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2, 144), Tile(64, 128, 8, 2, 160)),
    },
    "gfx9": {  # 64 KiB of local memory; a limit on registers cannot be set
        32: Config(Tile(128, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
        64: Config(Tile(128, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
        128: Config(Tile(128, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
    },
}
_FLOAT32 = {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1, 176)}  # full float32 products, without tensor cores
_MASK_REGISTERS = {"sm_80": 48, "sm_100": 48}  # added to the limit: a spill costs more than a lost resident block


def architecture(device: torch.device) -> str:
    """The architecture whose configurations a device uses; for the interpreter on a CPU, that of the smallest GPU."""
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
    """The tile of the forward kernel; ``masked`` if there is a key mask.

    Raises:
        ValueError: a head dim above 128.
    """
    return _adapt(_find(_CONFIGS[architecture], head_dim).forward, architecture, head_dim, dtype, masked)


@cache
def backward_config(architecture: str, head_dim: int, dtype: torch.dtype, masked: bool = False) -> BackwardConfig:
    """The tiles of the backward kernels; ``masked`` if there is a key mask.

    Raises:
        ValueError: a head dim above 128.
    """
    config = _find(_CONFIGS[architecture], head_dim)
    return BackwardConfig(
        _adapt(config.query, architecture, head_dim, dtype, masked),
        _adapt(config.key_value, architecture, head_dim, dtype, masked),
    )


def descriptor_tiles(head_dim: int) -> tuple[Tile, ...]:
    """Tiles of the forward kernel on sm_90 with descriptors, to compare with the default tile.

    Without registers for addresses, a step of 128 keys fits at head dim 128, which is the fastest width for the tensor
    cores.
    """
    if not 64 < head_dim <= 128:
        return ()
    return Tile(128, 64, 8, 3, descriptors=True), Tile(128, 128, 8, 2, descriptors=True)


@dataclass(frozen=True)
class Epilogue:
    """How the forward kernel computes maps.

    Attributes:
        tokens: what is computed before the loop over the keys, in registers and shared memory: "late", nothing;
            "keys", the weights and keys of the selected tokens are loaded; "scores", also their product with the
            queries.
        output_last: whether the maps are written before the output.
        overlap: whether the launch of the mean over heads starts before the end of this one.
    """

    tokens: str = "late"
    output_last: bool = False
    overlap: bool = False


# What the forward kernel computes of the selected tokens before its loop, by the largest head dim of a line: in simple
# calls (one phrase, one chunk of tokens, no key mask) and in others. As much as the registers have room for.
_TOKENS = {
    "sm_80": {64: ("late", "late"), 128: ("scores", "scores")},
    "sm_90": {32: ("late", "late"), 64: ("scores", "late"), 128: ("scores", "scores")},
    "sm_100": {64: ("late", "late"), 128: ("scores", "scores")},
    "gfx9": {128: ("late", "late")},
}


@cache
def epilogue_config(
    architecture: str, head_dim: int, dtype: torch.dtype, tile: Tile, simple: bool, overlap: bool = False
) -> Epilogue:
    """The epilogue of the forward kernel; ``simple`` if there are one phrase, one chunk of tokens and no key mask.

    On an H200 at head dim 128 only one block is resident on a multiprocessor, so nothing overlaps its waits for memory.
    There maps cost 3.4 % with keys loaded early and the output written last, and 9.1 % with the output written first.
    At head dim 64 a second block overlaps them, and the output is better written first.
    """
    if dtype == torch.float32 or tile.descriptors or tile.block_n > 64:  # such tiles need the registers
        return Epilogue(overlap=overlap)
    tokens = _find(_TOKENS[architecture], head_dim)[not simple]
    return Epilogue(tokens, output_last=architecture == "sm_90" and head_dim > 64, overlap=overlap)


@cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a device supports programmatic dependent launches, also while a CUDA graph is captured."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0) and _driver() >= 12030


def _driver() -> int:
    """The version of CUDA that the driver supports, as 1000 * major + 10 * minor; 0 if unknown."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def maps_config(head_dim: int, dtype: torch.dtype, simple: bool) -> Tile:
    """The tile of the kernel for maps from a log-sum-exp: small, as the kernel is bound by memory.

    Four of its blocks fit on a multiprocessor. In ``simple`` calls, with one phrase, one chunk of tokens and no key
    mask, each of them also prefetches two tiles of rows.
    """
    if dtype == torch.float32:
        return Tile(32 if head_dim <= 128 and simple else 16, 16, 4, 1, 168)
    return Tile(64 if head_dim <= 128 else 32, 16, 4, 3 if simple and head_dim <= 128 else 1, 168)


def statistics_config(head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of the kernels for statistics of all pairs, a sum over keys or over rows; not tuned on a GPU."""
    if dtype == torch.float32:  # products without matrix units, whose operands are in registers
        return Tile(32 if head_dim <= 128 else 16, 16, 4, 1)
    return Tile(64 if head_dim <= 128 else 32, 32, 4, 2)


_T = TypeVar("_T")


def _find(table: Mapping[int, _T], head_dim: int) -> _T:
    for width, entry in table.items():
        if head_dim <= width:
            return entry
    raise ValueError(f"head_dim must be at most 128 for the Triton kernels, got {head_dim}")


def _adapt(tile: Tile, architecture: str, head_dim: int, dtype: torch.dtype, masked: bool) -> Tile:
    if dtype == torch.float32:
        return _find(_FLOAT32, head_dim)
    if masked and tile.max_registers is not None:
        return replace(tile, max_registers=min(tile.max_registers + _MASK_REGISTERS.get(architecture, 0), 248))
    return tile
