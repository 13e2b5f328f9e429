"""Resource usage of the compiled Triton attention kernels, without a GPU: python -m tools.compile_report

The report has one line for each architecture, kernel, head dimension and dtype, with the tile configuration in the
package for the installed version of triton. A line has the registers per thread without and with maps, the stack
(spills), the shared memory, and the number of blocks that fit on a multiprocessor. For Hopper it also has the number of
some instructions in the code with maps: warp-group matrix products and their fences, bulk (TMA) and asynchronous
copies, exponentials, and barriers. For the forward kernel on Hopper, lines for tiles with tensor descriptors follow.

Registers and stack are read from the compiled code by triton's cuobjdump. The limits of a multiprocessor are from
NVIDIA's tables of compute capabilities: 64 Ki registers, allocated to a warp in units of 256; 64 warps; 164 or 228 KiB
of shared memory, of which each block uses 1 KiB in addition to its allocation.
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

from star_kernels.attention import triton_backward, triton_forward, triton_maps, triton_statistics, triton_tiles
from star_kernels.attention.triton_config import (
    Epilogue,
    Tile,
    backward_config,
    descriptor_tiles,
    epilogue_config,
    forward_config,
    maps_config,
    statistics_config,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx9": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = ("sm_80", "sm_90", "sm_100")
SHARED_MEMORY = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}  # bytes per multiprocessor
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (32, 64, 128)
KERNELS = ("forward", "query", "key_value")
EPILOGUES = tuple(
    Epilogue(tokens, output_last) for tokens in ("late", "keys", "scores") for output_last in (False, True)
)
POINTERS = {
    "p_index": "*i32",
    "p_mask": "*u8",
    "p_pairs": "*u8",
    **dict.fromkeys(
        (
            "p_lse",
            "p_lse2",
            "p_delta",
            "p_grad_lse",
            "p_grads",
            "p_weight",
            "p_maps",
            "p_mean",
            "p_table",
            "p_entropy",
            "p_sums",
        ),
        "*fp32",
    ),
}
# Matrix products, their fences, bulk and asynchronous copies, exponentials, barriers.
HOPPER = ("HGMMA", "WARPGROUP", "UTMALDG", "LDGSTS", "MUFU", "BAR")
SCALARS = {"scale": "fp32", "scale_log2": "fp32", "share": "fp32"}


@dataclass(frozen=True)
class Variant:
    """A specialisation of a kernel, as its launcher compiles it. ``tile`` None selects the tile in the package."""

    kernel: str  # one of KERNELS, "maps", "mean", "rows" or "columns"
    architecture: str
    width: int  # head dim
    dtype: str = "bf16"
    maps: bool = True
    masked: bool = False
    groups: int = 1
    even: bool = False  # the number of keys is a multiple of the tile's
    reduce_heads: bool = True
    grad_lse: bool = False
    text_to_image: bool = False
    one_chunk: bool = True
    pairs: bool = False  # a mask by query
    tile: Tile | None = None
    epilogue: Epilogue | None = None

    def shipped_tile(self) -> Tile:
        if self.kernel in ("maps", "mean"):
            return maps_config(self.width, DTYPES[self.dtype], self.simple)
        if self.kernel in ("rows", "columns"):
            return statistics_config(self.width, DTYPES[self.dtype])
        arguments = self.architecture, self.width, DTYPES[self.dtype], self.masked
        tile: Tile = (
            forward_config(*arguments)
            if self.kernel == "forward"
            else getattr(backward_config(*arguments), self.kernel)
        )
        return tile

    @property
    def simple(self) -> bool:
        """Whether there are one phrase, one chunk of tokens and no mask."""
        return self.groups == 1 and self.one_chunk and not self.masked and not self.pairs

    def shipped_epilogue(self, tile: Tile) -> Epilogue:
        overlap = self.architecture in ("sm_90", "sm_100")
        if self.epilogue is not None or self.kernel != "forward":
            return self.epilogue or Epilogue(overlap=overlap)
        return epilogue_config(self.architecture, self.width, DTYPES[self.dtype], tile, self.simple, overlap)


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int
    blocks: int  # per multiprocessor


@cache
def build(variant: Variant) -> Any:
    """Compiles the kernel with the arguments of its launcher."""
    tile = variant.tile or variant.shipped_tile()
    modules = {"forward": triton_forward, "maps": triton_maps, "mean": triton_maps}
    modules |= dict.fromkeys(("rows", "columns"), triton_statistics)
    module = modules.get(variant.kernel, triton_backward)
    function = getattr(module, f"{variant.kernel}_kernel")
    epilogue = variant.shipped_epilogue(tile)
    constants: dict[str, Any] = {
        "HEAD_DIM": variant.width,
        "BLOCK_D": triton_tiles.padded(variant.width),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "EVEN": variant.even,
        "TOKEN_LSE": variant.text_to_image,
        "TOKENS": epilogue.tokens,
        "OUTPUT_LAST": epilogue.output_last,
        "OVERLAP": epilogue.overlap,
        "FOLLOWED": epilogue.overlap and variant.maps and variant.reduce_heads,
        "ONE_CHUNK": variant.one_chunk,
        "ONE_PHRASE": variant.groups == 1 and (variant.kernel == "maps" or epilogue.tokens != "late"),
        "BLOCK_R": triton_maps.MEAN_ROWS,
        "STAGES": tile.num_stages,
    }
    if not variant.maps:
        constants |= dict.fromkeys(("p_index", "p_weight", "p_maps", "p_grads", "p_table"))
    rows = {"d_q": tile.block_m, "d_k": tile.block_n, "d_v": tile.block_n}
    if not tile.descriptors:
        constants |= dict.fromkeys(rows)
    if not variant.masked:
        constants["p_mask"] = None
    if not variant.pairs:
        constants["p_pairs"] = None
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
    options = {**tile.launch, **triton_maps.dependent(epilogue.overlap and variant.kernel in ("maps", "mean"))}
    return triton.compile(source, target=TARGETS[variant.architecture], options=options)


def measure(variant: Variant) -> Usage:
    """The resource usage of a kernel."""
    compiled = build(variant)
    registers, stack = resources(compiled)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (65536 // 4 // per_warp) // warps  # each quarter of the registers has warps of its own
    by_shared = SHARED_MEMORY[variant.architecture] // (shared + 1024)
    return Usage(registers, stack, shared, min(by_registers, by_shared, 64 // warps))


def resources(compiled: Any) -> tuple[int, int]:
    """Registers per thread and stack in bytes."""
    dump = cuobjdump(compiled, "--dump-resource-usage")
    registers, stack = (int(re.findall(rf"{name}:(\d+)", dump)[-1]) for name in ("REG", "STACK"))
    return registers, stack


def cuobjdump(compiled: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def instructions(compiled: Any) -> Counter[str]:
    """The number of each machine instruction in the code, without instruction suffixes."""
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", cuobjdump(compiled, "-sass")))


def summary(compiled: Any) -> str:
    """Registers, stack, shared memory and instruction counts of a kernel for sm_90, as shown in docs/hopper.md."""
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
    parser = argparse.ArgumentParser(prog="python -m tools.compile_report", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--architectures", nargs="+", choices=NVIDIA, default=NVIDIA, help="architectures (default: all)"
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="kernels (default: all)")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="head dimensions (default: 32 64 128)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], help="dtypes (default: bf16)")
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
