"""The Triton kernels of the policy, compiled ahead of time as their launchers ask for it: no GPU is needed.

The launchers run on tensors without memory, and their arguments are specialised as Triton would: pointers and strides
on divisibility by 16, strides of one as constants, and what a kernel says not to specialise not at all. Registers and
stack are read from the code object by the cuobjdump that comes with triton. What a multiprocessor can hold is from
NVIDIA's tables of compute capabilities: 64 Ki registers, given out to a warp in units of 256; 64 warps.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any
from unittest import mock

import baselines
import pytest
import torch
from tiers import mostly_exhaustive
from torch import Tensor

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels of the interpreter cannot be compiled", allow_module_level=True)

from triton.compiler import ASTSource  # noqa: E402

from star_kernels.policy import triton_latents, triton_loss, triton_nft, triton_sampling  # noqa: E402
from tools.compile_report import NVIDIA, TARGETS, resources  # noqa: E402

# Bandwidth times latency, for each multiprocessor: 2, 3.35 and 8 TB/s, 0.7 us, 108, 132 and 148 of them.
BYTES_IN_FLIGHT = {"sm_80": 13 * 1024, "sm_90": 18 * 1024, "sm_100": 38 * 1024}
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.bool: "i1",
}
FLOAT, BRAIN = torch.float32, torch.bfloat16
# shape, channel dimension
LAYOUTS = {"image": ((4, 16, 64, 64), 1), "packed": ((4, 1024, 64), 2), "odd": ((4, 3, 37, 31), 1)}
# name: launcher, kernel, whether every option is on, whether locations have ratios
KERNELS = {
    "forward": ("policy_forward", False, False),
    "forward_location": ("policy_forward", True, True),
    "backward": ("policy_backward", False, False),
    "backward_location": ("policy_backward", True, True),
    "nft_forward": ("nft_forward", True, False),
    "nft_backward": ("nft_backward", True, False),
    "sampling": ("sample_transition", False, False),
}


class Recorder:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.arguments, self.constants = arguments, constants

        return launch


def launch(
    name: str, shape: tuple[int, ...], channel_dim: int, outputs: torch.dtype, latents: torch.dtype, grid: Any = None
) -> Recorder:
    """What the launcher of a kernel passes on; ``grid``: that of weights."""
    function, every_option, per_location = KERNELS[name]
    locations = [n for d, n in enumerate(shape) if d not in (0, channel_dim)]
    batch = shape[0]

    def empty(*size: int, dtype: torch.dtype = FLOAT) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    output, sample = empty(*shape, dtype=outputs), empty(*shape, dtype=latents)
    row, number, table = empty(batch, *locations), empty(batch), empty(6, batch)
    weights = empty(batch, *grid) if grid else None
    mask = empty(batch, *locations, dtype=torch.bool) if every_option else None
    numbers, other = (number, output) if every_option else (None, None)
    policy = (output, sample, sample, row, number, table, weights, mask, numbers, other, other,
              channel_dim, per_location, every_option, False, 0.9, 1.1, 5.0, 0.1)  # fmt: skip
    nft = (output, output, sample, number, number, weights, mask, numbers, other,
           channel_dim, True, every_option, False, 1.0, 5.0, 0.1)  # fmt: skip
    arguments, results, module = {
        "policy_forward": (policy, (empty(), empty(6), empty(2, batch)), triton_loss),
        "policy_backward": (policy, (empty(), empty(2, batch), output), triton_loss),
        "nft_forward": (nft, (empty(), empty(5), empty(3, batch)), triton_nft),
        "nft_backward": (nft, (empty(), empty(3, batch), output), triton_nft),
        "sample_transition": ((output, sample, empty(*shape), table, channel_dim), (sample, row), triton_sampling),
    }[function]
    kernel = "sampling_kernel" if name == "sampling" else f"{function}_kernel"
    recorder = Recorder(getattr(module, kernel))
    with mock.patch.object(module, kernel, recorder):
        getattr(module, function)(*arguments, *results)
    return recorder


def specialise(recorder: Recorder) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes of the arguments, as Triton's launch would have them."""
    names = recorder.kernel.arg_names
    constants = {name: value for name, value in recorder.constants.items() if name in names}
    values = dict(zip(names, recorder.arguments, strict=False)) | constants
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], Any] = {}
    for position, name in enumerate(names):
        value = values[name]
        sixteenth = name.startswith("p_") and name not in triton_latents.NUMBERS
        if name in constants or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in triton_latents.SIZES:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            sixteenth = value % 16 == 0 and name not in triton_latents.SIZES
        if sixteenth and signature[name] != "constexpr":
            aligned[position,] = [["tt.divisibility", 16]]
    return signature, constants, aligned


@cache
def build(name: str, architecture: str, layout: str, outputs: torch.dtype, latents: torch.dtype) -> Any:
    recorder = launch(name, *LAYOUTS[layout], outputs, latents)
    signature, constants, aligned = specialise(recorder)
    source = ASTSource(fn=recorder.kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[architecture], options=triton_latents.LAUNCH)


def wide_accesses(compiled: Any, kind: str) -> int:
    """Loads or stores of 16 bytes."""
    return len(re.findall(rf"{kind}\.global[\w.:]*\.v4\.b32", compiled.asm["ptx"]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("architecture", NVIDIA)
def test_enough_bytes_are_in_flight_and_next_to_nothing_spills(architecture: str, name: str) -> None:
    """What keeps memory busy is bytes asked for at once, and registers bound how many threads can ask. The assembler
    prefers to spill a value, once in a program and outside of its loops, to losing a block: two words are let pass."""
    warps = triton_latents.LAUNCH["num_warps"]
    for layout in ("image", "packed"):
        compiled = build(name, architecture, layout, BRAIN, FLOAT)
        registers, stack = resources(compiled)
        blocks = min(4 * (65536 // 4 // (-(-registers * 32 // 256) * 256)) // warps, 64 // warps)
        print(f"{architecture} {name} {layout}: {registers} registers, stack {stack}, {blocks} blocks")
        assert stack <= 8
        loads = wide_accesses(compiled, "ld") // (2 if name == "backward_location" else 1)  # which reads twice
        assert blocks * warps * 32 * loads * 16 >= BYTES_IN_FLIGHT[architecture]


@pytest.mark.exhaustive
def test_no_kernel_takes_more_registers_than_it_did() -> None:
    measured = {
        f"sm_90 policy {name} {layout}": resources(build(name, "sm_90", layout, BRAIN, FLOAT))[0]
        for name in KERNELS
        for layout in ("image", "packed")
    }
    baselines.compare("registers", f"triton {triton.__version__}", measured, allowed=0.05)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["forward", "forward_location", "backward", "nft_forward", "nft_backward", "sampling"])
@pytest.mark.parametrize(("outputs", "latents"), [(FLOAT, FLOAT), (BRAIN, FLOAT), (BRAIN, BRAIN)], ids=str)
def test_contiguous_latents_are_read_and_written_16_bytes_at_a_time(
    name: str, outputs: torch.dtype, latents: torch.dtype
) -> None:
    elements = 2048 // (32 * triton_latents.LAUNCH["num_warps"])  # of a tile, for each thread
    output, latent, noise = (elements * dtype.itemsize // 16 for dtype in (outputs, latents, FLOAT))
    loads = {
        "forward": output + 2 * latent,
        "forward_location": 3 * output + 2 * latent,
        "backward": output + 2 * latent,
        "nft_forward": 3 * output + latent,
        "nft_backward": 3 * output + latent,
        "sampling": output + latent + noise,
    }[name]
    stores = {"backward": output, "nft_backward": output, "sampling": latent}.get(name, 0)
    for layout in ("image", "packed"):
        compiled = build(name, "sm_90", layout, outputs, latents)
        assert wide_accesses(compiled, "ld") == loads
        assert wide_accesses(compiled, "st") == stores


@pytest.mark.parametrize("name", mostly_exhaustive(KERNELS, ["forward", "nft_backward"]))
def test_no_product_is_fused_with_a_sum(name: str) -> None:
    for layout in ("image", "packed"):
        compiled = build(name, "sm_90", layout, BRAIN, FLOAT)
        assert not compiled.metadata.enable_fp_fusion  # the assembler is told as well
        assert "fma.rn.f32" not in compiled.asm["ptx"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["forward", "nft_forward"])
def test_arrival_is_announced_after_all_stores_and_read_before_all_loads(name: str) -> None:
    """Barrier, acquire-release on the counter, barrier, and loads past the first-level cache."""
    ptx = build(name, "sm_90", "image", BRAIN, FLOAT).asm["ptx"]
    before, after = re.split(r"atom\.[\w.:]*acq_rel[\w.:]*", ptx)
    assert before.rindex("bar.sync") > before.rindex("st.global")
    assert after.index("bar.sync") < after.index("ld.global")
    assert "ld.global.cg.b64" in after


@pytest.mark.parametrize("name", KERNELS)
def test_other_sizes_and_weights_start_no_compilation(name: str) -> None:
    expected = specialise(launch(name, (4, 16, 64, 64), 1, BRAIN, FLOAT, (64, 64)))
    assert specialise(launch(name, (1, 16, 48, 80), 1, BRAIN, FLOAT)) == expected
    assert specialise(launch(name, (7, 16, 16, 16), 1, BRAIN, FLOAT, (1, 8))) == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KERNELS)
def test_amd_and_odd_sizes_compile(name: str) -> None:
    assert build(name, "gfx9", "image", BRAIN, FLOAT).asm["hsaco"]
    compiled = build(name, "sm_90", "odd", BRAIN, FLOAT)
    assert wide_accesses(compiled, "ld") == 0  # they would cross the end of a row
