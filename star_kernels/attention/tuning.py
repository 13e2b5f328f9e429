"""Which kernels of a GPU compute attention, by measurement where there is one.

A table is a JSON file for a kind of device, made by benchmarks/tune_attention.py: in the folder that the environment
variable ``STAR_KERNELS_TUNED`` names, or beside this file in ``tuned/``. An entry is for a dtype, a head dimension and
a class of sequence lengths. It names the forward kernel (which has the maps in its epilogue, or a map kernel behind it)
and the backward kernel.

Without an entry, by what is known of the devices:

* 16 bits, head dimension up to 64: Triton, forward and backward.
* 16 bits, larger heads, on Hopper and later: cuDNN, forward and backward. Others measure it at 1.6 times the speed of
  a Triton kernel there (head dimension 128).
* 16 bits, larger heads, on older GPUs: flash, forward and backward.
* float32: Triton, whose products are float32 throughout, forward and backward.
* Head dimensions beyond Triton's: the first of PyTorch's kernels that takes them.

A gradient of the maps or of the log-sum-exp, and a key mask, always take Triton's kernels: the vendors' know neither.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from star_kernels.attention import vendor
from star_kernels.attention.triton_config import BackwardConfig, Tile

FOLDER = Path(__file__).with_name("tuned")
TRITON_HEAD_DIM = 128
TILES = ("forward", "query", "key_value")


@dataclass(frozen=True)
class Plan:
    """The kernels of a call: "triton" or one of ``vendor.KERNELS``, and tiles of the former (None: its defaults)."""

    forward: str
    backward: str
    forward_tile: Tile | None = None
    backward_config: BackwardConfig | None = None
    measured: bool = False


def plan(device: torch.device, dtype: torch.dtype, head_dim: int, queries: int, keys: int) -> Plan:
    """The kernels for unmasked attention of this kind on a CUDA device."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _plan(index, dtype, head_dim, size_class(queries, keys), vendor.flash_implementation())


def size_class(queries: int, keys: int) -> int:
    """The nearest power of two, by its exponent, of the geometric mean of the two lengths."""
    return round(math.log2(queries * keys) / 2)


def obstacle(kernel: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps a kernel of a GPU from these inputs, if anything."""
    if kernel != "triton":
        return vendor.limits(kernel, dtype, head_dim)
    return None if head_dim <= TRITON_HEAD_DIM else f"its head dimension goes up to {TRITON_HEAD_DIM}"


@cache
def _plan(index: int, dtype: torch.dtype, head_dim: int, size: int, flash: str) -> Plan:
    found = _find(table(torch.cuda.get_device_name(index)), dtype, head_dim, size, flash)
    if found is not None:
        return found
    return default_plan(dtype, head_dim, torch.cuda.get_device_capability(index))


def default_plan(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> Plan:
    """What this file says of a device without an entry."""
    wide = "cudnn" if capability >= (9, 0) else "flash"
    wanted = ["triton"] if dtype == torch.float32 or head_dim <= 64 else [wide, "flash", "efficient", "triton"]
    wanted += ["efficient", "flash", "triton"]
    kernel = next((k for k in wanted if obstacle(k, dtype, head_dim) is None), "triton")
    return Plan(kernel, kernel)


def vendor_plan(chosen: Plan, dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> Plan:
    """The plan with vendors' kernels alone: the chosen ones, or else the first that can."""
    able = [k for k in _by_speed(capability) if vendor.limits(k, dtype, head_dim) is None]
    first = able[0] if able else "triton"
    forward, backward = (k if k in able else first for k in (chosen.forward, chosen.backward))
    return Plan(forward, backward)


def _by_speed(capability: tuple[int, int]) -> tuple[str, ...]:
    return ("cudnn", "flash", "efficient") if capability >= (9, 0) else ("flash", "cudnn", "efficient")


def _find(entries: tuple[dict[str, Any], ...], dtype: torch.dtype, head_dim: int, size: int, flash: str) -> Plan | None:
    """The entry for this kind of call with the nearest class of lengths; 16-bit dtypes stand for one another."""
    names = [_name(dtype)] + [_name(d) for d in _alike(dtype)]
    fits = [entry for entry in entries if entry["dtype"] in names and entry["head_dim"] == head_dim]
    fits = [entry for entry in fits if "flash" not in (entry["forward"], entry["backward"]) or entry["flash"] == flash]
    fits = [e for e in fits if not any(obstacle(e[name], dtype, head_dim) for name in ("forward", "backward"))]
    if not fits:
        return None
    entry = min(fits, key=lambda e: (abs(e["size_class"] - size), names.index(e["dtype"])))
    return read_plan(entry)


def read_plan(entry: dict[str, Any]) -> Plan:
    """An entry of a table as a plan."""
    tiles = {name: Tile(*entry["tiles"][name]) for name in TILES if name in entry.get("tiles", {})}
    backward = None
    if "query" in tiles and "key_value" in tiles:
        backward = BackwardConfig(tiles["query"], tiles["key_value"])
    return Plan(entry["forward"], entry["backward"], tiles.get("forward"), backward, measured=True)


def slug(device_name: str) -> str:
    """The name of a device as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def write_table(folder: Path, device_name: str, environment: dict[str, Any], entries: list[dict[str, Any]]) -> Path:
    """Writes a table for a kind of device; the file."""
    path = folder / f"{slug(device_name)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"device": device_name, "environment": environment, "entries": entries}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


@cache
def table(device_name: str) -> tuple[dict[str, Any], ...]:
    """The entries of the first table that there is for a kind of device.

    Raises:
        ValueError: a table that cannot be read; the message names the file and what is wrong with it.
    """
    folders = [Path(os.environ["STAR_KERNELS_TUNED"])] if os.environ.get("STAR_KERNELS_TUNED") else []
    for folder in (*folders, FOLDER):
        path = folder / f"{slug(device_name)}.json"
        if path.exists():
            return _read(path)
    return ()


def _read(path: Path) -> tuple[dict[str, Any], ...]:
    checks: dict[str, Callable[[Any], bool]] = {
        "dtype": lambda v: v in ("float32", "float16", "bfloat16"),
        "head_dim": lambda v: isinstance(v, int),
        "size_class": lambda v: isinstance(v, int),
        "forward": lambda v: v in ("triton", *vendor.KERNELS),
        "backward": lambda v: v in ("triton", *vendor.KERNELS),
        "flash": lambda v: isinstance(v, str),
    }
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        for number, entry in enumerate(entries):
            for name, good in checks.items():
                if not good(entry.get(name)):
                    raise ValueError(f"entry {number} has {name} = {entry.get(name)!r}")
            read_plan(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} is no table of tune_attention.py: {problem}") from problem
    return tuple(entries)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _alike(dtype: torch.dtype) -> list[torch.dtype]:
    return [d for d in (torch.bfloat16, torch.float16) if d != dtype] if dtype != torch.float32 else []
