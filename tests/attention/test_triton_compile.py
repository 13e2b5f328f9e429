"""Every shipped configuration of the Triton kernels, compiled ahead of time: no GPU is needed.

Registers and stack are read from the code object by the cuobjdump that comes with triton. What a multiprocessor can
hold is from NVIDIA's tables of compute capabilities: 64 Ki registers, given out to a warp in units of 256; 64 warps;
164 or 228 KiB of shared memory, of which each block takes 1 KiB more than it asks for.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels of the interpreter cannot be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from star_kernels.attention import triton_backward, triton_forward, triton_maps  # noqa: E402
from star_kernels.attention.triton_config import Tile, backward_config, forward_config, maps_config  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx9": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = ["sm_80", "sm_90", "sm_100"]
SHARED_MEMORY = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}  # of a multiprocessor, bytes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = [32, 64, 128]
KERNELS = ["forward", "query", "key_value"]
POINTERS = {
    "p_index": "*i32",
    "p_counter": "*i32",
    "p_mask": "*u8",
    **dict.fromkeys(
        ("p_lse", "p_delta", "p_grad_lse", "p_grad_maps", "p_weight", "p_maps", "p_partial", "p_table"), "*fp32"
    ),
}
SCALARS = {"scale": "fp32", "scale_log2": "fp32", "share": "fp32"}


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int
    blocks: int  # resident on a multiprocessor


@cache
def build(
    kernel: str, architecture: str, dtype: str, width: int, maps: bool, masked: bool = False, groups: int = 1
) -> tuple[Any, Tile]:
    """The compiled kernel as the launcher would ask for it, and its tile."""
    constants: dict[str, Any] = {"HEAD_DIM": width, "BLOCK_D": triton_maps.padded(width), "HAS_MASK": masked}
    if kernel == "maps":
        function, tile = triton_maps.maps_kernel, maps_config(width)
        constants |= {"REDUCE": True, "TOKEN_LSE": False}
    elif kernel == "forward":
        function, tile = triton_forward.forward_kernel, forward_config(architecture, width, DTYPES[dtype], masked)
        constants |= {"MAPS": maps, "REDUCE": maps, "EVEN": False, "BLOCK_N": tile.block_n}
    else:
        function = getattr(triton_backward, f"{kernel}_kernel")
        tile = getattr(backward_config(architecture, width, DTYPES[dtype], masked), kernel)
        constants |= {"MAPS": maps, "BLOCK_N": tile.block_n}
        constants |= {"GRAD_LSE": False, "EVEN": False} if kernel == "query" else {}
    constants["BLOCK_M"] = tile.block_m
    if "BLOCK_G" in function.arg_names:
        constants["BLOCK_G"] = triton_maps.group_tile(groups)
    signature, aligned = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTERS.get(name, f"*{dtype}") if name.startswith("p_") else SCALARS.get(name, "i32")
        if name.startswith("p_") or (name.startswith("stride_") and width % 16 == 0):
            aligned[position,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[architecture], options=tile.launch), tile


def measure(compiled: Any, tile: Tile, architecture: str, folder: Path) -> Usage:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    run = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{name}:(\d+)", run.stdout).group(1)) for name in ("REG", "STACK"))
    shared = compiled.metadata.shared
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (65536 // 4 // of_a_warp) // tile.num_warps  # each quarter serves its own warps
    by_shared = SHARED_MEMORY[architecture] // (shared + 1024)
    return Usage(registers, stack, shared, min(by_registers, by_shared, 64 // tile.num_warps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", NVIDIA)
def test_maps_cost_no_spills_and_no_occupancy(
    architecture: str, kernel: str, width: int, dtype: str, tmp_path: Path
) -> None:
    without, with_maps = (
        measure(*build(kernel, architecture, dtype, width, maps), architecture, tmp_path) for maps in (False, True)
    )
    print(f"{architecture} {kernel} {width} {dtype}: {without} -> {with_maps}")
    assert without.stack == with_maps.stack == 0
    assert with_maps.registers <= without.registers + 16
    assert with_maps.blocks >= without.blocks >= 1


@pytest.mark.parametrize(
    ("width", "masked", "groups"),
    [(64, True, 1), (128, True, 1), (64, False, 4), (72, False, 1)],
    ids=["mask-64", "mask-128", "groups", "padded-72"],
)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", NVIDIA)
def test_no_variant_spills(
    architecture: str, kernel: str, width: int, masked: bool, groups: int, tmp_path: Path
) -> None:
    if groups > 1 and kernel != "forward":
        return  # the backward kernels loop over groups
    usage = measure(*build(kernel, architecture, "bf16", width, True, masked, groups), architecture, tmp_path)
    assert usage.stack == 0
    assert usage.blocks >= 1


@pytest.mark.parametrize("architecture", NVIDIA)
def test_the_kernel_for_maps_alone_does_not_spill(architecture: str, tmp_path: Path) -> None:
    for width in WIDTHS:
        assert measure(*build("maps", architecture, "bf16", width, True), architecture, tmp_path).stack == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_hopper_runs_warp_group_products(kernel: str) -> None:
    for width in WIDTHS:
        assert "wgmma.mma_async" in build(kernel, "sm_90", "bf16", width, True)[0].asm["ptx"]


def test_arrival_is_announced_after_all_stores_and_read_before_all_loads() -> None:
    """Barrier, acquire-release on the counter, barrier: the order that the mean over heads rests on."""
    for architecture in NVIDIA:
        ptx = build("forward", architecture, "bf16", 64, True)[0].asm["ptx"]
        before, after = re.split(r"atom\.[\w.:]*acq_rel[\w.:]*", ptx)
        assert before.rindex("bar.sync") > before.rindex("st.global")
        assert after.index("bar.sync") < after.index("ld.global")


@pytest.mark.parametrize("kernel", [*KERNELS, "maps"])
@pytest.mark.parametrize("width", [64, 128])
def test_amd_compiles(kernel: str, width: int) -> None:
    compiled, _ = build(kernel, "gfx9", "bf16", width, True)
    assert compiled.asm["hsaco"]
    assert compiled.metadata.shared <= 64 * 1024
