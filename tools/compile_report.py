"""What the Triton attention kernels compile to, without a GPU: python -m tools.compile_report [--widths 64 128]

One line for each architecture, kernel, head dim and dtype, in the configuration that is shipped for the installed
version of triton: registers of a thread without and with maps, stack (spills), shared memory, and the blocks that fit
on a multiprocessor; for Hopper also how often some instructions are in the code with maps: warp-group products and the
fences around them, bulk (TMA) and asynchronous copies, exponentials, barriers. Last come the tiles with descriptors.

Registers and stack are read from the code object by the cuobjdump that comes with triton. What a multiprocessor can
hold is from NVIDIA's tables of compute capabilities: 64 Ki registers, given out to a warp in units of 256; 64 warps;
164 or 228 KiB of shared memory, of which each block takes 1 KiB more than it asks for.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from star_kernels.attention import triton_backward, triton_forward, triton_maps
from star_kernels.attention.triton_config import (
    Tile,
    backward_config,
    descriptor_tiles,
    forward_config,
    loads_tokens_early,
    maps_config,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx9": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = ("sm_80", "sm_90", "sm_100")
SHARED_MEMORY = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}  # of a multiprocessor, bytes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (32, 64, 128)
KERNELS = ("forward", "query", "key_value")
POINTERS = {
    **dict.fromkeys(("p_index", "p_counter"), "*i32"),
    "p_mask": "*u8",
    **dict.fromkeys(
        ("p_lse", "p_lse2", "p_delta", "p_grad_lse", "p_grads", "p_weight", "p_maps", "p_partial", "p_table"),
        "*fp32",
    ),
}
HOPPER = ("HGMMA", "WARPGROUP", "UTMALDG", "LDGSTS", "MUFU", "BAR")  # products, their fences, copies, exponentials
SCALARS = {"scale": "fp32", "scale_log2": "fp32", "share": "fp32"}


@dataclass(frozen=True)
class Variant:
    """One way in which the launchers call a kernel; ``tile`` None is the one that is shipped."""

    kernel: str  # one of KERNELS, or "maps"
    architecture: str
    width: int  # head dim
    dtype: str = "bf16"
    maps: bool = True
    masked: bool = False
    groups: int = 1
    even: bool = False  # no partial tile of keys
    reduce_heads: bool = True
    grad_lse: bool = False
    text_to_image: bool = False
    tile: Tile | None = None

    def shipped_tile(self) -> Tile:
        if self.kernel == "maps":
            return maps_config(self.width, DTYPES[self.dtype], self.groups == 1 and not self.masked)
        arguments = self.architecture, self.width, DTYPES[self.dtype], self.masked
        tile: Tile = (
            forward_config(*arguments)
            if self.kernel == "forward"
            else getattr(backward_config(*arguments), self.kernel)
        )
        return tile


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int
    blocks: int  # resident on a multiprocessor


@cache
def build(variant: Variant) -> Any:
    """The kernel compiled as the launcher asks for it."""
    tile = variant.tile or variant.shipped_tile()
    module = {"forward": triton_forward, "maps": triton_maps}.get(variant.kernel, triton_backward)
    function = getattr(module, f"{variant.kernel}_kernel")
    reduces = variant.maps and variant.reduce_heads
    constants: dict[str, Any] = {
        "HEAD_DIM": variant.width,
        "BLOCK_D": triton_maps.padded(variant.width),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_G": triton_maps.group_tile(variant.groups),
        "MAPS": variant.maps,
        "REDUCE": reduces,
        "HAS_MASK": variant.masked,
        "EVEN": variant.even,
        "GRAD_LSE": variant.grad_lse,
        "TOKEN_LSE": variant.text_to_image,
        "EARLY": loads_tokens_early(variant.architecture, variant.width, DTYPES[variant.dtype], tile),
        "ONE_CHUNK": True,
        "STAGES": tile.num_stages,
    }
    if not variant.maps:
        constants |= dict.fromkeys(("p_index", "p_weight", "p_maps", "p_partial", "p_grads", "p_table"))
    rows = {"d_q": tile.block_m, "d_k": tile.block_n, "d_v": tile.block_n}
    if not tile.descriptors:
        constants |= dict.fromkeys(rows)
    if not reduces:
        constants["p_counter"] = None
    if not variant.grad_lse:
        constants["p_grad_lse"] = None
    signature, aligned = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in rows:
            signature[name] = f"tensordesc<{variant.dtype}{[1, 1, rows[name], constants['BLOCK_D']]}>"
        elif name.startswith("p_"):
            signature[name] = POINTERS.get(name, f"*{variant.dtype}")
        else:
            signature[name] = SCALARS.get(name, "i32")
        if name.startswith("p_") or (name.startswith("stride_") and variant.width % 16 == 0):
            aligned[position,] = [["tt.divisibility", 16]]
    constants = {name: constants[name] for name in function.arg_names if name in constants}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[variant.architecture], options=tile.launch)


def measure(variant: Variant) -> Usage:
    compiled = build(variant)
    registers, stack = resources(compiled)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (65536 // 4 // of_a_warp) // warps  # each quarter serves its own warps
    by_shared = SHARED_MEMORY[variant.architecture] // (shared + 1024)
    return Usage(registers, stack, shared, min(by_registers, by_shared, 64 // warps))


def resources(compiled: Any) -> tuple[int, int]:
    """Registers of a thread and bytes of stack."""
    dump = cuobjdump(compiled, "--dump-resource-usage")
    registers, stack = (int(re.findall(rf"{name}:(\d+)", dump)[-1]) for name in ("REG", "STACK"))
    return registers, stack


def cuobjdump(compiled: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def instructions(compiled: Any) -> Counter[str]:
    """How often each machine instruction is in the code, without its suffixes."""
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", cuobjdump(compiled, "-sass")))


def summary(compiled: Any) -> str:
    """Registers, stack, shared memory and the instructions of a kernel for sm_90 that docs/hopper.md discusses."""
    found = instructions(compiled)
    counts = " ".join(f"{name} {found[name]}" for name in HOPPER)
    registers, stack = resources(compiled)
    return (
        f"registers {registers}, stack {stack}, shared {compiled.metadata.shared}, "
        f"warps {compiled.metadata.num_warps}, instructions {found.total()}: {counts}"
    )


def line(variant: Variant) -> str:
    without, with_maps = measure(replace(variant, maps=False)), measure(variant)
    tile = variant.tile or variant.shipped_tile()
    shape = f"{tile.block_m}x{tile.block_n} {tile.num_warps}w {tile.num_stages}s{' bulk' if tile.descriptors else ''}"
    text = (
        f"{variant.architecture:7}{variant.kernel:10}{variant.width:4} {variant.dtype} {shape:19}"
        f"{without.registers:4} ->{with_maps.registers:4}{with_maps.stack:6}{with_maps.shared:8}"
        f"{without.blocks:4} ->{with_maps.blocks:2}"
    )
    if variant.architecture == "sm_90":
        found = instructions(build(variant))
        text += "".join(f"{found[name]:6}" for name in HOPPER)
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="compile_report.py", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=NVIDIA, default=NVIDIA)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="head dims")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    options = parser.parse_args(arguments)
    print(f"triton {triton.__version__}")
    print(f"target kernel     dim type tile           registers  stack  shared  blocks {' '.join(HOPPER)}")
    for architecture in options.architectures:
        for kernel in options.kernels:
            for width in options.widths:
                tiles: list[Tile | None] = [None]
                if (architecture, kernel) == ("sm_90", "forward"):
                    tiles += descriptor_tiles(width)
                for dtype, tile in product(options.dtypes, tiles):
                    print(line(Variant(kernel, architecture, width, dtype, tile=tile)), flush=True)


if __name__ == "__main__":
    main()
