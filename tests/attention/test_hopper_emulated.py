"""The attention kernel for Hopper without a GPU: csrc/cuda compiled for the host with the headers of cuda_emulation.

First the emulation itself: its products, and the faults of a kernel that it must find. Then the kernel.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import hopper_emulation
import pytest
import torch
from tiers import mostly_exhaustive
from torch import Tensor
from triton_cases import Case, Inputs, bshd, eager, exact, make, packed

from star_kernels import native
from star_kernels.attention import hopper

DTYPES = [torch.bfloat16, torch.float16]
SCHEDULES = range(4)  # see cuda_emulation/device.h
PROBE = (hopper_emulation.EMULATION / "probe.cpp").read_text()
FAULTS = re.findall(r"^  k(\w+),$", PROBE.split("enum Fault")[1].split("}")[0], re.MULTILINE)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hopper_emulation.build(tmp_path_factory)


def product(
    emulated: Any,
    width: int,
    *,
    transposed: bool,
    first: int = 0,
    gathered: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    fault: str = "None",
) -> bool:
    """Whether a product of the probe is right."""
    torch.manual_seed(0)
    a = torch.randn(64, 64).to(dtype)
    # Rows before the first one and after the last one are zeros in shared memory. So are columns after the last one.
    b = torch.randn((64, width) if transposed else (width, 64)).to(dtype)[:, : width - 8 if transposed else 56]
    tile = torch.zeros((64, width) if transposed else (width, 64), dtype=torch.float64)
    rows = b[max(first, 0) :][: tile.shape[0] - max(-first, 0)].double()
    tile[max(-first, 0) :][: len(rows), : b.shape[1]] = rows
    d = torch.full((64, width), torch.nan)
    emulated.product(a, b, d, first, transposed, gathered, dtype == torch.bfloat16, FAULTS.index(fault))
    expected = a.double() @ (tile if transposed else tile.T)
    return torch.allclose(d.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_tiles_in_shared_memory(emulated: Any, dtype: torch.dtype, schedule: int) -> None:
    emulated.set_seed(schedule)
    for width, first in ((16, 0), (96, 5), (112, 0), (128, -3), (160, 0), (176, 100)):
        assert product(emulated, width, transposed=False, first=first, dtype=dtype)
    for width, first in ((64, 0), (128, 3), (128, -60)):
        assert product(emulated, width, transposed=True, first=first, dtype=dtype)
    assert product(emulated, 128, transposed=False, gathered=True, dtype=dtype)


# What shows of each fault: a wrong result, or a part of an error.
REPORTS = {
    "WrongStride": "wrong",
    "WrongLeading": "wrong",
    "ReadsBeforeWait": "wrong",
    "NeverWaits": "a thread ends before its products",
    "NoFence": "a product without multiply_fence",
    "WritesAfterFence": "written after the last multiply_fence",
    "WritesOperand": "registers of a pending product",
    "WritesAccumulators": "accumulators of a pending product",
    "ThreadsDiffer": "start different products",
    "OneWarpMissing": "product 0 of its warp group; 96 threads have started it",
    "WrongParity": "waits twice for the same phase|ended before the last one",
    "NoWaitForCopy": "wrong|ended before the last one|more arrivals",
    "NoInitFence": "mbarrier_init_fence does not follow",
    "TooManyArrivals": "more arrivals",
    "TooManyBytes": "0 have ended, 0 arrivals and 16 bytes are missing",
    "ReusesEarly": "wrong",
    "MisalignedTile": "multiple of 1024 bytes",
    "SkipsPhase": "more arrivals|ended before the last one",
    "NoSharedFence": "shared_fence has not made visible",
    "NoCopyWait": "shared_fence has not made visible|a thread ends before its copies",
    "MissingAtNamed": "named barrier 2; 96 of 128 threads",
    "TwiceAtNamed": "arrives twice at a named barrier",
    "TooManyRegisters": "256 registers",
    "DifferentRegisters": "differ in registers",
}
GATHERED = {"NoSharedFence", "NoCopyWait", "MissingAtNamed", "TwiceAtNamed"}
FROM_SHARED = {"ThreadsDiffer", "OneWarpMissing", *GATHERED}  # others multiply by a tile of values


def outcome(emulated: Any, fault: str) -> str:
    try:
        options = {"transposed": fault not in FROM_SHARED, "gathered": fault in GATHERED}
        return "right" if product(emulated, 128, fault=fault, **options) else "wrong"
    except RuntimeError as problem:
        return str(problem)


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_a_fault_shows(emulated: Any, fault: str) -> None:
    for schedule in SCHEDULES:
        emulated.set_seed(schedule)
        if fault != "ReusesEarly" or schedule == 1:  # a product that ends at once has read its tile
            assert re.search(REPORTS[fault], outcome(emulated, fault))


def test_every_fault_of_the_probe_has_a_report() -> None:
    assert set(FAULTS[1:]) == set(REPORTS)


def attend(emulated: Any, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "cuda", lambda: emulated)
        return hopper.attention(*inputs.tensors, inputs.arguments, **options)


def error(found: Tensor, expected: Tensor) -> float:
    same = found.double() == expected.double()  # infinities
    return torch.where(same, 0.0, (found.double() - expected.double()).abs()).max().item()


def assert_right(found: tuple[Tensor, Tensor | None, Tensor], inputs: Inputs) -> None:
    """Within twice the error of PyTorch in the same dtype; maps and log-sum-exp, which are float32, within 1e-5."""
    expected, reference = exact(inputs), eager(*inputs.tensors, inputs)
    out, maps, lse = found
    assert error(out, expected[0]) <= 2 * error(reference[0], expected[0])
    assert error(lse, expected[2]) <= 1e-5
    if maps is not None:
        assert error(maps, expected[1]) <= 1e-5


PER_HEAD = Case(reduce_heads=False)
CASES = {
    "one row": replace(PER_HEAD, shape=(1, 1, 1, 1, 64), slots=1),
    "tails": replace(PER_HEAD, shape=(1, 2, 150, 200, 64)),
    "full tiles": replace(PER_HEAD, shape=(1, 1, 128, 352, 64)),
    "five tiles of keys": replace(PER_HEAD, shape=(1, 1, 70, 800, 64)),
    "cross-attention": replace(PER_HEAD, shape=(2, 2, 90, 33, 64), phrases=2, masked="some"),
    "phrases of many tokens": replace(PER_HEAD, shape=(1, 2, 140, 190, 64), phrases=3, slots=40, masked="some"),
    "a sequence without keys": replace(PER_HEAD, shape=(2, 1, 40, 64, 64), phrases=2, masked="all"),
    "rows": replace(PER_HEAD, shape=(2, 2, 300, 180, 64), rows=(140, 60), slots=17),
    "negative scale": replace(PER_HEAD, shape=(1, 1, 70, 180, 64), scale=-0.3),
    "128: one row": replace(PER_HEAD, shape=(1, 1, 1, 1, 128), slots=1),
    "128: tails": replace(PER_HEAD, shape=(1, 2, 150, 300, 128), slots=17),
    "128: masked": replace(PER_HEAD, shape=(2, 1, 130, 260, 128), masked="some", phrases=2),
}


@pytest.mark.parametrize(
    ("name", "dtype", "schedule"),
    mostly_exhaustive(
        itertools.product(CASES, DTYPES, SCHEDULES),
        lambda name, dtype, schedule: (
            (list(CASES).index(name) + DTYPES.index(dtype)) % 2 == 0 and schedule == list(CASES).index(name) % 4
        ),
    ),
)
def test_attention_and_maps_are_those_of_the_reference(
    emulated: Any, name: str, dtype: torch.dtype, schedule: int, poisoned: None
) -> None:
    torch.manual_seed(0)
    inputs = make(CASES[name], dtype)
    emulated.set_seed(schedule)
    assert_right(attend(emulated, inputs), inputs)


@pytest.mark.parametrize("layout", [bshd, packed])
def test_any_strides(emulated: Any, layout: Any) -> None:
    torch.manual_seed(0)
    inputs = make(replace(PER_HEAD, shape=(2, 2, 70, 200, 64)), torch.bfloat16)
    emulated.set_seed(3)
    expected = attend(emulated, inputs)
    laid_out = replace(inputs, tensors=tuple(layout(t) for t in inputs.tensors))
    assert_right(expected, inputs)
    for one, other in zip(attend(emulated, laid_out), expected, strict=True):
        assert torch.equal(one, other)


def test_every_schedule_gives_the_bits_of_the_first_with_and_without_maps(emulated: Any) -> None:
    torch.manual_seed(0)
    inputs = make(replace(PER_HEAD, shape=(1, 3, 130, 400, 64), slots=17, phrases=2), torch.float16)
    emulated.set_seed(0)
    out, maps, lse = attend(emulated, inputs)
    for schedule in range(1, 6):
        emulated.set_seed(schedule)
        found = attend(emulated, inputs)
        assert all(torch.equal(one, other) for one, other in zip(found, (out, maps, lse), strict=True))
    other_out, no_maps, other_lse = attend(emulated, inputs, with_maps=False)
    assert no_maps is None
    assert torch.equal(other_out, out)
    assert torch.equal(other_lse, lse)


def test_positions_past_the_keys_count_nothing(emulated: Any) -> None:
    torch.manual_seed(0)
    inputs = make(replace(PER_HEAD, shape=(1, 1, 20, 40, 64), slots=4), torch.float16)
    emulated.set_seed(1)
    inputs.index[0, 2] = -1
    _, expected, _ = attend(emulated, inputs)
    inputs.index[0, 2] = 40
    _, maps, _ = attend(emulated, inputs)
    assert torch.equal(maps, expected)


@pytest.mark.exhaustive
def test_variants(tmp_path_factory: pytest.TempPathFactory) -> None:
    emulated = hopper_emulation.build(tmp_path_factory, variants=True)
    for head_dim, variants in hopper.VARIANTS.items():
        for variant, (schedule, masked) in itertools.product(variants, enumerate(("", "some"), 1)):
            torch.manual_seed(0)
            case = replace(PER_HEAD, shape=(1, 3, 200, 500, head_dim), slots=17, phrases=2, masked=masked)
            inputs = make(case, torch.bfloat16)
            emulated.set_seed(schedule)
            assert_right(attend(emulated, inputs, variant=hopper.Variant(*variant)), inputs)
