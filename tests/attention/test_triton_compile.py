"""Every shipped configuration of the Triton kernels, compiled ahead of time: no GPU is needed.

tools/compile_report.py defines what is compiled, and how registers and resident blocks are counted.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from itertools import product

import baselines
import pytest
from tiers import mostly_exhaustive

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels of the interpreter cannot be compiled", allow_module_level=True)

from star_kernels.attention.triton_config import Epilogue, Tile, descriptor_tiles  # noqa: E402
from tools.compile_report import (  # noqa: E402
    DTYPES,
    EPILOGUES,
    KERNELS,
    NVIDIA,
    WIDTHS,
    Variant,
    build,
    instructions,
    measure,
)

VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])
SHIPPED = [
    *((architecture, width) for architecture in NVIDIA for width in WIDTHS),
    ("sm_90", 72),  # head dims with a separate configuration
    ("sm_100", 72),
]
VARIANTS = {
    "even": {"even": True},
    "mask": {"masked": True},
    "padded": {"width": 72},
    "padded-mask": {"width": 72, "masked": True},
    "groups": {"groups": 4},
    "groups-mask": {"groups": 4, "masked": True},
    "per-head": {"reduce_heads": False},
    "chunks": {"one_chunk": False},
    "groups-chunks-mask": {"groups": 4, "one_chunk": False, "masked": True},
    "lse": {"grad_lse": True},
    "lse-mask-even": {"grad_lse": True, "masked": True, "even": True},
}
OF_KERNEL = {
    "forward": ["even", "padded", "padded-mask", "groups-mask", "per-head", "chunks", "groups-chunks-mask"],
    "query": ["even", "padded-mask", "lse", "lse-mask-even"],
    "key_value": ["mask", "padded-mask"],
}
CASES = [
    (architecture, kernel, width, name)
    for architecture in NVIDIA
    for kernel, names in OF_KERNEL.items()
    for name in names
    for width in ((64, 128) if name in ("even", "mask") else (128,))
]


@pytest.fixture(autouse=True)
def guaranteed(request: pytest.FixtureRequest) -> None:
    architecture = getattr(request.node, "callspec", None) and request.node.callspec.params.get("architecture")
    if architecture == "sm_80" and VERSION >= (3, 9):
        pytest.skip("triton 3.9 keeps operands of sm_80 in registers across the loop: some configurations spill")


def check(variant: Variant) -> None:
    """Maps cost no resident block and few registers, and nothing spills."""
    without, with_maps = measure(replace(variant, maps=False)), measure(variant)
    print(f"{variant}: {without} -> {with_maps}")
    assert without.stack == with_maps.stack == 0
    assert with_maps.registers <= without.registers + (16 if without.blocks > 1 else 48)
    assert with_maps.blocks >= without.blocks >= 1
    if variant.architecture == "sm_80":
        assert with_maps.shared <= 99 * 1024, "sm_86, sm_89 and sm_120 have no more"


# One configuration of each kernel is checked always.
QUICK = [(kernel, "sm_90", 64, "bf16") for kernel in KERNELS]
COMBINATIONS = [(k, *device, dtype) for k in KERNELS for device in SHIPPED for dtype in ("bf16", "fp16")]


@pytest.mark.parametrize(("kernel", "architecture", "width", "dtype"), mostly_exhaustive(COMBINATIONS, QUICK))
def test_maps_cost_no_spills_and_no_occupancy(kernel: str, architecture: str, width: int, dtype: str) -> None:
    check(Variant(kernel, architecture, width, dtype))


@pytest.mark.exhaustive
def test_no_kernel_takes_more_registers_than_it_did() -> None:
    """On Hopper, for tiles that other tests compile anyway."""
    variants = [Variant(kernel, "sm_90", width) for kernel in (*KERNELS, "maps") for width in WIDTHS]
    measured = {f"{v.architecture} {v.kernel} {v.width} {v.dtype}": measure(v).registers for v in variants}
    baselines.compare("registers", f"triton {triton.__version__}", measured, allowed=0.05)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("architecture", "kernel", "width", "name"), CASES)
def test_no_variant_spills(architecture: str, kernel: str, width: int, name: str) -> None:
    usage = measure(replace(Variant(kernel, architecture, width), **VARIANTS[name]))
    assert usage.stack == 0
    assert usage.blocks >= 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_maps_cost_as_little_with_even_tiles_and_masks_on_hopper(kernel: str, masked: bool) -> None:
    for width in (64, 128):
        check(Variant(kernel, "sm_90", width, masked=masked, even=not masked))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("architecture", "width"), [("sm_80", 128), ("sm_90", 64), ("sm_90", 128), ("sm_100", 128)])
def test_float32_does_not_spill(architecture: str, width: int, kernel: str) -> None:
    usage = measure(Variant(kernel, architecture, width, "fp32"))
    assert usage.stack == 0
    assert usage.blocks >= 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("text_to_image", [False, True], ids=["image_to_text", "text_to_image"])
@pytest.mark.parametrize("architecture", NVIDIA)
def test_the_maps_kernel_does_not_spill(architecture: str, text_to_image: bool) -> None:
    plain = Variant("maps", architecture, 64, text_to_image=text_to_image)
    for width in (64, 128, 256):
        for dtype in ("bf16", "fp32"):
            for one_chunk in (False, True):
                masked = replace(plain, width=width, dtype=dtype, masked=True, groups=4, one_chunk=one_chunk)
                for variant in (masked, replace(masked, pairs=True)):
                    usage = measure(variant)
                    assert usage.stack == 0, variant
                    assert usage.blocks >= 3, variant
    assert measure(replace(plain, dtype="fp16", reduce_heads=False)).stack == 0


@pytest.mark.parametrize(("architecture", "width"), mostly_exhaustive(product(NVIDIA, (64, 128)), [("sm_90", 128)]))
def test_the_maps_kernel_prefetches_rows_in_copies_of_16_bytes(architecture: str, width: int) -> None:
    variant = Variant("maps", architecture, width)
    compiled = build(variant)
    usage = measure(variant)
    assert usage.stack == 0
    assert usage.blocks >= 4  # triton_maps.resident_programs
    sizes = re.findall(r"cp\.async\.\w+\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", compiled.asm["ptx"])
    assert sizes
    assert {int(size, 0) for size in sizes} == {16}
    assert usage.shared >= 2 * 64 * width * 2  # of two tiles on their way


@pytest.mark.exhaustive
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_the_epilogues_that_are_compared_on_a_gpu_do_not_spill(epilogue: Epilogue) -> None:
    """On Hopper, in simple calls."""
    for width in (64, 128):
        for even in (False, True):
            variant = Variant("forward", "sm_90", width, even=even, epilogue=epilogue)
            usage = measure(variant)
            assert usage.stack == 0, variant
            assert usage.blocks == measure(replace(variant, maps=False)).blocks, variant


@pytest.mark.exhaustive
@pytest.mark.parametrize("kernel", KERNELS)
def test_warp_group_products_on_hopper_are_not_serialised(kernel: str) -> None:
    """With too few registers or several accumulators in one loop ptxas fences every product of a tile."""
    for width in (64, 72, 128):
        found = instructions(build(Variant(kernel, "sm_90", width)))
        assert 0 < found["WARPGROUP"] < found["HGMMA"]
    assert instructions(build(Variant(kernel, "sm_90", 32)))["HGMMA"] > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("tile", descriptor_tiles(128), ids=lambda tile: f"{tile.block_m}x{tile.block_n}")
def test_descriptors_replace_address_registers_by_bulk_copies(tile: Tile, dtype: str) -> None:
    variant = Variant("forward", "sm_90", 128, dtype, tile=tile)
    check(variant)
    check(replace(variant, even=True))
    check(replace(variant, width=72, masked=True))
    assert measure(replace(variant, groups=4)).stack == 0
    by_pointers = replace(variant, even=True, tile=replace(tile, descriptors=False))
    assert measure(replace(variant, even=True)).registers < measure(by_pointers).registers
    found = instructions(build(variant))
    assert found["UTMALDG"] > 0
    assert found["LDGSTS"] == 0
    assert found["WARPGROUP"] < found["HGMMA"]


@pytest.mark.parametrize(
    ("architecture", "kernel"), mostly_exhaustive(product(("sm_90", "sm_100"), ("maps", "mean")), [("sm_90", "mean")])
)
def test_a_dependent_launch_reads_nothing_before_the_launch_before_it_has_ended(architecture: str, kernel: str) -> None:
    compiled = build(Variant(kernel, architecture, 128))
    assert compiled.metadata.launch_pdl
    before, _, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
    assert "ld.global" in after
    for access in ("ld.global", "st.global", "cp.async", "atom.", "red.global"):
        assert access not in before


@pytest.mark.exhaustive
def test_only_launches_that_the_mean_over_heads_follows_announce_it() -> None:
    for kernel in ("forward", "maps"):
        variant = Variant(kernel, "sm_90", 64)
        assert "griddepcontrol.launch_dependents" in build(variant).asm["ptx"]
        per_head = build(replace(variant, reduce_heads=False))
        assert "griddepcontrol.launch_dependents" not in per_head.asm["ptx"]
        for other in (replace(variant, architecture="sm_80"), replace(variant, architecture="sm_80", kernel="mean")):
            compiled = build(other)
            assert "griddepcontrol" not in compiled.asm["ptx"]
            assert not compiled.metadata.launch_pdl


@pytest.mark.exhaustive
@pytest.mark.parametrize("kernel", [*KERNELS, "maps", "mean"])
@pytest.mark.parametrize("width", [64, 128])
def test_amd_compiles(kernel: str, width: int) -> None:
    compiled = build(Variant(kernel, "gfx9", width))
    assert compiled.asm["hsaco"]
    assert compiled.metadata.shared <= 64 * 1024


def test_every_dtype_has_a_configuration() -> None:
    for dtype in DTYPES:
        for architecture, width in SHIPPED:
            for kernel in KERNELS:
                assert Variant(kernel, architecture, width, dtype).shipped_tile().num_warps in (4, 8)
