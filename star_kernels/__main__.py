"""``python -m star_kernels``: prints versions, compiled libraries and the backends that "auto" selects."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

import torch

from star_kernels import native
from star_kernels.attention import dispatch, vendor
from star_kernels.policy.backends import choose_backend as choose_policy_backend

DESCRIPTION = (
    "Prints the versions of packages, the compiled libraries, and the backends that 'auto' selects on this machine. "
    "Other commands: python -m star_kernels.maps draws attention maps, star-train trains a model."
)
_PACKAGES = ("star-kernels", "torch", "triton", "apache-tvm-ffi", "diffusers", "transformers")


def report() -> list[tuple[str, str]]:
    """(name, value) for each line of the report."""
    lines = [("python", f"{platform.python_version()} on {platform.machine()}")]
    lines += [(name, _version(name)) for name in _PACKAGES]
    lines += [
        ("CPU library", _library("libstar_kernels_cpu.so")),
        ("CUDA library", _library("libstar_kernels_cuda.so")),
    ]
    lines.append(("threads", str(native.threads())))
    lines.append(("GPU", _gpu()))
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = f"{device}, {str(dtype).removeprefix('torch.')}"
            lines += [(f"attention, {name}{more}", value) for more, value in _attention(device, dtype)]
            lines.append((f"policy loss, {name}", choose_policy_backend(device, dtype)))
    return lines


def _attention(device: str, dtype: torch.dtype) -> list[tuple[str, str]]:
    """The backends that "auto" selects; on a GPU for common head dimensions, and the length of a 1024² image."""
    if device == "cpu":
        return [("", dispatch.choose_backend(device, dtype, head_dim=64))]
    lines = []
    for head_dim in (64, 128):
        value = dispatch.choose_backend(device, dtype, head_dim)
        if value == "auto":
            plan = dispatch.plan(torch.device(device), dtype, head_dim, 4429, 4429)
            source = "measured" if plan.measured else "not measured on this device"
            value = f"{plan.forward} forward, {plan.backward} backward ({source})"
            if "flash" in (plan.forward, plan.backward):
                value += f", flash is {vendor.flash_implementation()}"
        lines.append((f", head dimension {head_dim}", value))
    return lines


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _library(name: str) -> str:
    library, problem = native.load(name)
    if library is None:
        return f"no: {problem}"
    if "cuda" in name:
        return f"yes, for {library.architectures()}"
    return f"yes, using {library.isa()} (this processor supports: {library.runnable_isas()})"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none available to torch"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m star_kernels", description=DESCRIPTION).parse_args(arguments)
    lines = report()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
