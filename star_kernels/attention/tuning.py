"""Which kernels of a GPU compute attention, by measurement where there is one.

A table is a JSON file for a kind of device, made by tools/tune_attention.py: in the folder that the environment
variable ``STAR_KERNELS_TUNED`` names, or beside this file in ``tuned/``. An entry is for a dtype, a head dimension and
a class of sequence lengths. It names the forward kernel (which has the maps in its epilogue, or a map kernel behind it)
and the backward kernel.

Without an entry, by what is known of the devices:

* 16 bits, head dimension up to 64: Triton, forward and backward; but on Hopper cuDNN backward, which took 0.91 to 0.97
  of the time of Triton's on an H200.
* 16 bits, larger heads, on Hopper and on Blackwell's sm_100 family: flash where the user has activated FA3 or FA4, or
  else cuDNN from 9.15.1 on, forward and backward. Others measure both at 1.6 times the speed of a Triton kernel there
  (head dimension 128).
* 16 bits, larger heads, on other GPUs from sm_80 on: flash, forward and backward.
* float32: the efficient kernel, forward and backward; Triton's took 3.7 and 6.5 times as long on an H200.
* Head dimensions beyond Triton's: the first of PyTorch's kernels that takes them.

A gradient of the maps or of the log-sum-exp, and a key mask, take Triton's kernels: the vendors' know neither. Where
Triton cannot run, that gradient goes through the efficient kernel in float32, and maps come from the log-sum-exp in
plain PyTorch. ``torch.use_deterministic_algorithms(True)`` takes Triton's backward pass too: it repeats to the bit.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
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


@cache
def triton_problem() -> str | None:
    """What keeps the Triton kernels from running, if anything."""
    return None if find_spec("triton") else "the package triton is not installed"


def obstacle(kernel: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps a kernel of a GPU from these inputs, if anything."""
    if kernel != "triton":
        return vendor.limits(kernel, dtype, head_dim)
    if head_dim > TRITON_HEAD_DIM:
        return f"its head dimension goes up to {TRITON_HEAD_DIM}"
    return triton_problem()


@cache
def _plan(index: int, dtype: torch.dtype, head_dim: int, size: int, flash: str) -> Plan:
    found = _find(table(torch.cuda.get_device_name(index)), dtype, head_dim, size, flash)
    if found is not None:
        return found
    return default_plan(dtype, head_dim, torch.cuda.get_device_capability(index), flash)


def default_plan(dtype: torch.dtype, head_dim: int, capability: tuple[int, int], flash: str = "FA2") -> Plan:
    """What this file says of a device without an entry."""
    vendors = _by_speed(capability, flash)
    wanted = ("triton", *vendors) if dtype != torch.float32 and head_dim <= 64 else (*vendors, "triton")
    kernel = next((k for k in wanted if obstacle(k, dtype, head_dim) is None), "triton")
    if kernel == "triton" and capability[0] == 9 and obstacle("cudnn", dtype, head_dim) is None:
        return Plan(kernel, "cudnn")
    return Plan(kernel, _differentiable(kernel, head_dim, capability))


@cache
def vendor_plan(chosen: Plan, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], flash: str) -> Plan:
    """The plan with vendors' kernels alone: the chosen ones, or else the first that can."""
    able = [k for k in _by_speed(capability, flash) if vendor.limits(k, dtype, head_dim) is None]
    first = able[0] if able else "triton"
    forward, backward = (k if k in able else first for k in (chosen.forward, chosen.backward))
    return Plan(forward, _differentiable(backward, head_dim, capability))


def _by_speed(capability: tuple[int, int], flash: str) -> tuple[str, ...]:
    if capability < (8, 0):  # the others begin there
        return ("efficient",)
    if capability[0] not in (9, 10):  # where PyTorch itself does not prefer cuDNN
        return ("flash", "efficient")
    return ("cudnn", "flash", "efficient") if flash == "FA2" else ("flash", "cudnn", "efficient")


def _differentiable(kernel: str, head_dim: int, capability: tuple[int, int]) -> str:
    """The kernel, or one that has a backward pass where it has none: flash on sm_86, sm_89 and sm_120, wide heads."""
    none = kernel == "flash" and head_dim > 192 and capability not in ((8, 0), (9, 0), (10, 0), (10, 3))
    return "efficient" if none else kernel


def _find(entries: tuple[dict[str, Any], ...], dtype: torch.dtype, head_dim: int, size: int, flash: str) -> Plan | None:
    """The entry for this kind of call with the nearest class of lengths; 16-bit dtypes stand for one another."""
    names = [_name(dtype)] + [_name(d) for d in _alike(dtype)]
    fits = [entry for entry in entries if entry["dtype"] in names and entry["head_dim"] == head_dim]
    fits = [entry for entry in fits if entry["flash"] == flash]  # what beat FA2 need not beat FA3
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
