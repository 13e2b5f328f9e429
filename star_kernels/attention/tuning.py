"""Tables of the fastest attention kernels, by measurement.

A table is a JSON file for one kind of device, written by tools/tune_attention.py: in the folder that the environment
variable ``STAR_KERNELS_TUNED`` names, or in ``tuned/`` beside this file. An entry is for a dtype, a head dimension and
a class of sequence lengths. It names the forward kernel (which computes the maps in its epilogue, or is followed by a
map kernel) and the backward kernel.
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
TILES = ("forward", "query", "key_value")


@dataclass(frozen=True)
class Plan:
    """The kernels of a call: "triton" or one of ``vendor.KERNELS``, and Triton's tiles (None: the defaults).

    The forward kernel may also be "hopper".
    """

    forward: str
    backward: str
    forward_tile: Tile | None = None
    backward_config: BackwardConfig | None = None
    measured: bool = False


def size_class(queries: int, keys: int) -> int:
    """The nearest power of two, by its exponent, of the geometric mean of the two lengths."""
    return round(math.log2(queries * keys) / 2)


def find(
    entries: tuple[dict[str, Any], ...],
    dtype: torch.dtype,
    head_dim: int,
    size: int,
    flash: str,
    can_run: Callable[[str], bool],
) -> Plan | None:
    """The entry for this kind of call with the nearest class of lengths; float16 and bfloat16 substitute each other.

    Args:
        entries: of a table.
        size: the class of lengths, see :func:`size_class`.
        flash: which flash attention PyTorch runs; entries measured with another one do not apply.
        can_run: whether a kernel supports the call.
    """
    names = [_name(dtype)] + [_name(d) for d in _substitutes(dtype)]
    fits = [e for e in entries if e["dtype"] in names and e["head_dim"] == head_dim and e["flash"] == flash]
    fits = [e for e in fits if can_run(e["forward"]) and can_run(e["backward"])]
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
    """The name of a device as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def write_table(folder: Path, device_name: str, environment: dict[str, Any], entries: list[dict[str, Any]]) -> Path:
    """Writes a table for a kind of device and returns its path."""
    path = folder / f"{slug(device_name)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"device": device_name, "environment": environment, "entries": entries}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


@cache
def table(device_name: str) -> tuple[dict[str, Any], ...]:
    """The entries of the first table found for a kind of device.

    Raises:
        ValueError: a table cannot be read; the message names the file and the fault.
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
        "forward": lambda v: v in ("triton", "hopper", *vendor.KERNELS),
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
        raise ValueError(f"{path} must be a table written by tools/tune_attention.py: {problem}") from problem
    return tuple(entries)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _substitutes(dtype: torch.dtype) -> list[torch.dtype]:
    return [d for d in (torch.bfloat16, torch.float16) if d != dtype] if dtype != torch.float32 else []
