"""The CUDA kernels as nvcc compiles them, if it is installed: registers, spills, width of loads. Nothing runs."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass

import baselines
import kernel_driver
import pytest
from build_folder import build_folder

pytestmark = pytest.mark.exhaustive
ARCHITECTURES = ("80", "90a", "100a")
# A multiprocessor has 65536 registers. A thread of a vector kernel has 96 to 192 bytes of loads in flight, so that 512
# threads have twice the bytes in flight that an H100 needs per multiprocessor (bandwidth times latency, 3.35 TB/s *
# 0.8 us / 132 = 20 KB). The gradient of ratios of locations keeps 64 residuals in registers: 384 threads.
REGISTERS = {"policy_location_backward_kernel": 65536 // 384}
MOST_REGISTERS = 65536 // 512
# Kernels that require clusters have no code for the first architecture.
FUSED = ("policy_fused_kernel", "nft_fused_kernel")
# Access to the latents: Vector<output, latent, packed, run> by the width of the dtypes, and Scalar.
VECTORS = {"float32", "16-bit and float32", "16-bit", "packed float32", "packed 16-bit and float32", "packed 16-bit"}
# Policy kernels are compiled twice: for one advantage per sample, and for those of phrases or of locations.
CREDITS = 2
KERNELS = {
    "policy_forward_kernel": VECTORS | {"scalar"},
    "policy_backward_kernel": VECTORS | {"scalar"},
    "policy_location_backward_kernel": VECTORS - {v for v in VECTORS if "packed" in v},
    "nft_forward_kernel": VECTORS | {"scalar"},
    "nft_backward_kernel": VECTORS | {"scalar"},
    "policy_fused_kernel": VECTORS | {"scalar"},
    "nft_fused_kernel": VECTORS | {"scalar"},
    "sample_kernel": VECTORS | {"scalar"},
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture."""

    symbol: str
    name: str
    access: str
    architecture: str
    registers: int
    stack: int
    spills: int


def kernel_of(symbol: str) -> tuple[str, str]:
    """Name and access of a mangled kernel."""
    (name,) = (kernel for kernel in KERNELS if f"{len(kernel)}{kernel}" in symbol)
    if "6Scalar" in symbol:
        return name, "scalar"
    output, latent, packed = re.search(r"6VectorI(f|NS\w*?4HalfE)(f|S\w*?_)Lb([01])E", symbol).groups()
    width = "float32" if output == "f" else "16-bit and float32" if latent == "f" else "16-bit"
    return name, f"packed {width}" if packed == "1" else width


@pytest.fixture(scope="module")
def compiled(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Compiled], dict[str, str]]:
    """The kernels for every architecture, and the PTX of each for the first that has it.

    They are compiled by the rules of setup.py. With STAR_KERNELS_BUILD, the library's build has compiled them already,
    and only what changed since is compiled again.
    """
    setup = kernel_driver.setup()
    names = setup["CUDA_KERNELS"]
    with pytest.MonkeyPatch.context() as patch, build_folder("libstar_kernels_cuda", tmp_path_factory) as folder:
        patch.delenv("STAR_KERNELS_CUDA_ARCHS", raising=False)
        setup["run_ninja"](folder, setup["cuda_rules"](folder), *(f"{name}.o" for name in names))
    report = "".join((folder / f"{name}.o.txt").read_text() for name in names)
    assert "warning" not in report, report
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'\n.*Function properties for .*\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    kernels = [
        Compiled(symbol, *kernel_of(symbol), architecture, int(registers), int(stack), int(stores) + int(loads))
        for symbol, architecture, stack, stores, loads, registers in re.findall(pattern, report)
    ]
    bodies = {}
    for architecture in ARCHITECTURES[:2]:
        for file in folder.glob(f"*/*compute_{architecture}*.ptx"):
            for symbol, body in re.findall(r"\.entry (\S+?)\(.*?\n\{(.*?)\n\}", file.read_text(), re.DOTALL):
                if (kernel_of(symbol)[0] in FUSED) == (architecture != ARCHITECTURES[0]):
                    bodies[symbol] = body
    return kernels, bodies


def test_every_kernel_is_compiled_for_every_architecture(compiled: tuple) -> None:
    expected = Counter((name, access) for name, accesses in KERNELS.items() for access in accesses)
    for key in expected:
        expected[key] *= CREDITS if key[0].startswith("policy") else 1
    for architecture in ARCHITECTURES:
        found = Counter((k.name, k.access) for k in compiled[0] if k.architecture == architecture)
        assert found == expected


def test_no_kernel_spills_or_keeps_local_memory(compiled: tuple) -> None:
    assert [k for k in compiled[0] if k.spills or k.stack] == []
    assert not any(".local" in body for body in compiled[1].values())


def test_registers_leave_room_for_the_threads_that_hide_the_latency(compiled: tuple) -> None:
    assert [k for k in compiled[0] if k.registers > REGISTERS.get(k.name, MOST_REGISTERS)] == []


def test_no_fused_kernel_takes_more_registers_than_it_did(nvcc: str, compiled: tuple) -> None:
    counted: dict[str, int] = {}
    for k in compiled[0]:
        if k.name in FUSED and k.architecture != ARCHITECTURES[0]:
            key = f"sm_{k.architecture} {k.name.removesuffix('_kernel')} {k.access}"
            counted[key] = max(counted.get(key, 0), k.registers)
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    baselines.compare("registers", f"nvcc {re.search(r'V([0-9.]+)', release)[1]}", counted, 0.1)


def test_fused_kernels_wait_for_their_cluster_before_they_end(compiled: tuple) -> None:
    fused = {symbol: body for symbol, body in compiled[1].items() if kernel_of(symbol)[0] in FUSED}
    assert len(fused) == (CREDITS + 1) * len(KERNELS["nft_fused_kernel"])
    for symbol, body in fused.items():
        after_the_last_store = body[body.rindex("st.global") :]
        assert after_the_last_store.count("barrier.cluster.wait") == 1, symbol


def test_vector_kernels_load_and_store_16_bytes_at_a_time(compiled: tuple) -> None:
    for symbol, body in compiled[1].items():
        name, access = kernel_of(symbol)
        wide = {kind: len(re.findall(rf"{kind}\S*\.v4\.\w*32", body)) for kind in ("ld.global", "st.global")}
        if access == "scalar" or (name in FUSED and "packed" not in access):  # runs of 4 bytes
            assert not wide["ld.global"], name
        else:
            tensors = 1 if access == "16-bit and float32" and "nft" in name else 2  # of 16 bytes in every run
            assert wide["ld.global"] >= tensors, (name, access)
        # float32 gradients and samples; the 16-bit ones beside float32 inputs go out in words of 8 bytes
        narrow = name in FUSED and access == "float32"
        if access in ("float32", "packed float32") and "forward" not in name and not narrow:
            assert wide["st.global"], (name, access)


def test_the_dtype_of_an_element_is_not_branched_upon(compiled: tuple) -> None:
    for symbol, body in compiled[1].items():
        if kernel_of(symbol)[1] == "float32":
            assert "cvt.f32.f16" not in body, symbol
