"""The Triton kernels of the policy, compiled ahead of time as for a call of their launchers, without a GPU.

The launchers run on tensors without memory, and their arguments are specialised as Triton would: pointers and strides
on divisibility by 16, strides of one and missing pointers as constants, and the arguments that a kernel excludes not at
all. Registers and stack are read from the code object by the cuobjdump that comes with triton. The capacity of a
multiprocessor is from NVIDIA's tables of compute capabilities: 64 Ki registers, allocated to a warp in units of 256;
64 warps.
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

from star_kernels.policy import (  # noqa: E402
    triton_gradient,
    triton_latents,
    triton_loss,
    triton_nft,
    triton_sampling,
)
from star_kernels.policy.arguments import (  # noqa: E402
    Backward,
    Forward,
    NftArguments,
    PolicyArguments,
    SampleArguments,
)
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
FLOAT, BF16 = torch.float32, torch.bfloat16
# shape, channel dimension
LAYOUTS = {"image": ((4, 16, 64, 64), 1), "packed": ((4, 1024, 64), 2), "odd": ((4, 3, 37, 31), 1)}
# name: launcher, whether every option is on, whether locations have ratios, the number of phrases or "dense" advantages
KERNELS = {
    "forward": ("policy_forward", False, False, 1),
    "forward_location": ("policy_forward", True, True, 1),
    "backward": ("policy_backward", False, False, 1),
    "backward_location": ("policy_backward", True, True, 1),
    "nft_forward": ("nft_forward", True, False, 1),
    "nft_backward": ("nft_backward", True, False, 1),
    "sampling": ("sample_transition", False, False, 1),
    "forward_phrases": ("policy_forward", False, False, 4),
    "forward_dense_location": ("policy_forward", True, True, "dense"),
    "backward_phrases": ("policy_backward", False, False, 4),
    "backward_dense": ("policy_backward", False, False, "dense"),
    "backward_phrases_location": ("policy_backward", True, True, 4),
}


class Recorder:
    """Replaces a kernel and keeps the arguments of a launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> None:
            self.arguments = arguments

        return launch


def launch(
    name: str, shape: tuple[int, ...], channel_dim: int, outputs: torch.dtype, latents: torch.dtype, grid: Any = None
) -> Recorder:
    """The arguments that a launcher passes to its kernel; ``grid``: that of weights, the locations by default."""
    function, every_option, per_location, credit = KERNELS[name]
    locations = [n for d, n in enumerate(shape) if d not in (0, channel_dim)]
    batch = shape[0]

    def empty(*size: int, dtype: torch.dtype = FLOAT) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    output, sample = empty(*shape, dtype=outputs), empty(*shape, dtype=latents)
    row, number, table = empty(batch, *locations), empty(batch), empty(6, batch)
    weights = empty(batch, *grid) if grid else None
    if credit == "dense":
        advantages = row
    elif credit > 1:
        advantages, weights = empty(batch, credit), empty(batch, credit, *(grid or locations))
    else:
        advantages = number
    options: Any = {
        "weights": weights,
        "mask": empty(batch, *locations, dtype=torch.bool) if every_option else None,
        "step_weights": number if every_option else None,
        "ref_model_output": output if every_option else None,
        "channel_dim": channel_dim,
        "weighted_kl": every_option and credit in (1, "dense"),
        "unreduced": False,
        "advantage_clip": 5.0,
        "kl_coef": 0.1,
    }
    arguments: Any
    if function.startswith("policy"):
        old = output if every_option else None
        arguments = PolicyArguments(
            output, sample, sample, row, advantages, table,
            old_model_output=old, per_location=per_location, clip_low=0.9, clip_high=1.1, **options,
        )  # fmt: skip
    elif function.startswith("nft"):
        arguments = NftArguments(output, output, sample, number, number, adaptive=True, beta=1.0, **options)
    else:
        arguments = SampleArguments(output, sample, empty(*shape), table, channel_dim)
    module, results = {
        "policy_forward": (triton_loss, lambda: [Forward(empty(), empty(7), empty(arguments.saved_rows, batch))]),
        "policy_backward": (triton_gradient, lambda: [Backward(empty(), empty(arguments.saved_rows, batch), output)]),
        "nft_forward": (triton_nft, lambda: [Forward(empty(), empty(5), empty(arguments.saved_rows, batch))]),
        "nft_backward": (triton_nft, lambda: [Backward(empty(), empty(arguments.saved_rows, batch), output)]),
        "sample_transition": (triton_sampling, lambda: [sample, row]),
    }[function]
    kernel = "sampling_kernel" if name == "sampling" else f"{function}_kernel"
    recorder = Recorder(getattr(module, kernel))
    with mock.patch.object(module, kernel, recorder):
        getattr(module, function)(arguments, *results())
    return recorder


def specialise(recorder: Recorder) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes of the arguments, as Triton's launch would determine them."""
    names = recorder.kernel.arg_names
    assert recorder.arguments.keys() - triton_latents.LAUNCH.keys() == set(names)
    constants = {p.name: recorder.arguments[p.name] for p in recorder.kernel.params if p.is_constexpr}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], Any] = {}
    for position, name in enumerate(names):
        value = recorder.arguments[name]
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
    """Bandwidth needs many bytes in flight, and registers bound the number of threads that load them. The assembler
    prefers to spill a value, once in a program and outside its loops, to losing a block: two words are allowed, and
    four in the kernel that keeps a sum for each phrase."""
    warps = triton_latents.LAUNCH["num_warps"]
    for layout in ("image", "packed"):
        compiled = build(name, architecture, layout, BF16, FLOAT)
        registers, stack = resources(compiled)
        blocks = min(4 * (65536 // 4 // (-(-registers * 32 // 256) * 256)) // warps, 64 // warps)
        print(f"{architecture} {name} {layout}: {registers} registers, stack {stack}, {blocks} blocks")
        assert stack <= (16 if name == "forward_phrases" else 8)
        reads = 2 if name in ("backward_location", "backward_phrases_location") else 1
        loads = wide_accesses(compiled, "ld") // reads
        assert blocks * warps * 32 * loads * 16 >= BYTES_IN_FLIGHT[architecture]


@pytest.mark.exhaustive
def test_no_kernel_takes_more_registers_than_it_did() -> None:
    measured = {
        f"sm_90 policy {name} {layout}": resources(build(name, "sm_90", layout, BF16, FLOAT))[0]
        for name in KERNELS
        for layout in ("image", "packed")
    }
    baselines.compare("registers", f"triton {triton.__version__}", measured, allowed=0.05)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["forward", "forward_location", "backward", "nft_forward", "nft_backward", "sampling"])
@pytest.mark.parametrize(("outputs", "latents"), [(FLOAT, FLOAT), (BF16, FLOAT), (BF16, BF16)], ids=str)
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
        compiled = build(name, "sm_90", layout, BF16, FLOAT)
        assert not compiled.metadata.enable_fp_fusion  # the assembler is told as well
        assert "fma.rn.f32" not in compiled.asm["ptx"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["forward", "nft_forward"])
def test_arrival_is_announced_after_all_stores_and_read_before_all_loads(name: str) -> None:
    """Barrier, acquire-release on the counter, barrier, and loads that bypass the first-level cache."""
    ptx = build(name, "sm_90", "image", BF16, FLOAT).asm["ptx"]
    before, after = re.split(r"atom\.[\w.:]*acq_rel[\w.:]*", ptx)
    assert before.rindex("bar.sync") > before.rindex("st.global")
    assert after.index("bar.sync") < after.index("ld.global")
    assert "ld.global.cg.b64" in after


@pytest.mark.parametrize("name", KERNELS)
def test_other_sizes_and_grids_of_weights_start_no_compilation(name: str) -> None:
    expected = specialise(launch(name, (4, 16, 64, 64), 1, BF16, FLOAT, (64, 64)))
    assert specialise(launch(name, (1, 16, 48, 80), 1, BF16, FLOAT, (48, 80))) == expected
    assert specialise(launch(name, (7, 16, 16, 16), 1, BF16, FLOAT, (1, 8))) == expected


def test_an_argument_that_is_not_given_is_a_constant() -> None:
    """Kernels receive None, and their code for the argument is left out."""
    for name in ("forward", "backward"):
        _, constants, _ = specialise(launch(name, *LAYOUTS["image"], BF16, FLOAT))
        missing = {key for key, value in constants.items() if value is None}
        assert missing - {"p_step_weights"} == {"p_weights", "p_mask", "p_old", "p_ref"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KERNELS)
def test_amd_and_odd_sizes_compile(name: str) -> None:
    assert build(name, "gfx9", "image", BF16, FLOAT).asm["hsaco"]
    compiled = build(name, "sm_90", "odd", BF16, FLOAT)
    assert wide_accesses(compiled, "ld") == 0  # they would cross the end of a row
