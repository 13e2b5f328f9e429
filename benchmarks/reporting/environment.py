"""Where the figures come from: device, versions, compiled libraries, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from star_kernels import native

PACKAGES = ("torch", "triton", "star-kernels", "diffusers", "transformers", "tokenizers", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    cpu_library = native.load("libstar_kernels_cpu.so")[0]
    return {
        "device": device.type,
        "device_name": device_name(device),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "libraries": {
            "cpu": None if cpu_library is None else str(cpu_library.isa()),
            "cuda": device.type == "cuda" and native.cuda() is not None,
        },
        "pytorch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def slug(environment: dict[str, Any]) -> str:
    """A file name for the kind of device."""
    words = environment["device_name"]
    if environment["device"] == "cpu":
        words += f" {environment['threads']} threads {environment['pytorch_cpu_capability']}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = match.group(1) if match else name
    name = re.sub(r"\((R|TM|tm|r)\)|\bCPU\b|@.*$|\bProcessor\b", " ", name)
    return " ".join(name.split())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source tree" if package == "star-kernels" else None


def _commit() -> str | None:
    """The commit, with ``-dirty`` where tracked files differ from it."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
