"""The results of our kernels are bitwise equal with any number of threads.

This does not include results that PyTorch computes: attention, its gradients, and the reference implementations.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import (
    TokenSelection,
    allocate,
    attention_maps,
    flow_sde,
    native,
    sample_transition,
    total_variation,
    weighted_nft_loss,
    weighted_policy_loss,
)

COUNTS = (1, 2, 3, 4, 7, 1)
KERNELS = [("native", "cpu")]
if torch.cuda.is_available():
    KERNELS += [("triton", "cuda")] + [("native", "cuda")] * (not native.problem("cuda"))
# Large enough for 7 threads.
LAYOUTS = {"image": ((4, 16, 64, 64), 1), "packed": ((2, 1100, 128), 2), "video": ((3, 7, 5, 60, 40), 1)}
kernels = pytest.mark.parametrize(("backend", "device"), [pytest.param(*k, marks=pytest.mark.native) for k in KERNELS])
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def assert_equal_bits(threads: Callable[[int], None]) -> Callable[[Callable[[], list[Tensor]]], None]:
    """A function that checks that the results of a function are bitwise equal with any number of threads."""

    def check(function: Callable[[], list[Tensor]]) -> None:
        found = []
        for count in COUNTS:
            threads(count)
            found.append(function())
        for count, other in zip(COUNTS[1:], found[1:], strict=True):
            for position, (first, result) in enumerate(zip(found[0], other, strict=True)):
                assert torch.equal(first, result), f"result {position} with {count} threads"

    return check


def latents(layout: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    shape, channel_dim = LAYOUTS[layout]
    locations = [n for d, n in enumerate(shape) if d != channel_dim]
    names = ("output", "old", "sample", "other")
    found = {name: torch.randn(shape, device=device).to(dtype) for name in names}
    found |= {"log_prob": torch.randn(locations, device=device) - 5, "mask": torch.rand(locations, device=device) < 0.8}
    return found | {"weights": torch.rand(locations, device=device), "numbers": torch.rand(shape[0], device=device)}


@kernels
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", ["sample", "location"])
def test_policy_loss_bits_do_not_depend_on_the_number_of_threads(
    ratio: str, dtype: torch.dtype, layout: str, backend: str, device: str, assert_equal_bits: Callable
) -> None:
    t = latents(layout, dtype, device)
    transition = flow_sde(0.9, 0.8, sigma_max=0.95).to(device)
    options: dict[str, Any] = {"weights": t["weights"], "mask": t["mask"], "step_weights": t["numbers"]}
    options |= {"old_model_output": t["old"], "ref_model_output": t["other"], "kl_coef": 0.1, "clip_range": 0.5}
    options |= {"channel_dim": LAYOUTS[layout][1], "ratio": ratio, "backend": backend}

    def results() -> list[Tensor]:
        leaf = t["output"].clone().requires_grad_()
        given = (leaf, t["sample"], t["other"], t["log_prob"], t["numbers"], transition)
        loss, metrics = weighted_policy_loss(*given, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaf), *metrics.values()]

    assert_equal_bits(results)


@kernels
@layouts
def test_nft_loss_bits_do_not_depend_on_the_number_of_threads(
    layout: str, backend: str, device: str, assert_equal_bits: Callable
) -> None:
    t = latents(layout, torch.float32, device)
    options: dict[str, Any] = {"weights": t["weights"], "mask": t["mask"], "step_weights": t["numbers"]}
    options |= {"ref_model_output": t["other"], "kl_coef": 0.1, "channel_dim": LAYOUTS[layout][1], "backend": backend}

    def results() -> list[Tensor]:
        leaf = t["output"].clone().requires_grad_()
        loss, metrics = weighted_nft_loss(leaf, t["old"], t["sample"], t["numbers"], t["numbers"], **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaf), *metrics.values()]

    assert_equal_bits(results)


@kernels
@layouts
def test_sampling_bits_do_not_depend_on_the_number_of_threads(
    layout: str, backend: str, device: str, assert_equal_bits: Callable
) -> None:
    t = latents(layout, torch.float32, device)
    transition = flow_sde(0.9, 0.8, sigma_max=0.95).to(device)
    options: dict[str, Any] = {"noise": t["other"], "channel_dim": LAYOUTS[layout][1], "backend": backend}
    assert_equal_bits(lambda: list(sample_transition(t["output"], t["sample"], transition, **options)))


@pytest.mark.native
@pytest.mark.parametrize("reduce_heads", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_attention_maps_bits_do_not_depend_on_the_number_of_threads(
    direction: str, dtype: torch.dtype, reduce_heads: bool, assert_equal_bits: Callable
) -> None:
    query, key = torch.randn(2, 4, 300, 64).to(dtype), torch.randn(2, 4, 310, 64).to(dtype)  # enough for 7 threads
    lse = torch.logsumexp(query.float() @ key.float().mT / 8, dim=-1)
    selection = TokenSelection.from_positions([[list(range(30)), [40, 299]], [[], list(range(100, 132))]])
    mask = torch.rand(2, 310) < 0.8
    options: dict[str, Any] = {"direction": direction, "key_mask": mask, "reduce_heads": reduce_heads}
    assert_equal_bits(lambda: [attention_maps(query, key, lse, selection, **options)])


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("shape", [(1, 1, 300, 300), (1, 10, 96, 96), (2, 3, 160, 160)], ids=str)
def test_allocation_bits_do_not_depend_on_the_number_of_threads(
    shape: tuple[int, ...], cap: float | None, assert_equal_bits: Callable
) -> None:
    """Includes a single sample, whose sum PyTorch's own reduction would divide among the threads."""
    maps = torch.rand(shape) ** 3

    def results() -> list[Tensor]:
        change = total_variation(maps, maps.flip(2), layout="bshw")
        signals = [allocate(maps, layout="bshw", over="trajectory", cap=cap, step_signal=s) for s in (None, change)]
        return [allocate(maps, layout="bshw", cap=cap), change, *signals]

    assert_equal_bits(results)


_ALLOCATIONS = """
import sys, torch
from star_kernels import allocate
torch.manual_seed(0)
maps = torch.rand(2, 3, 5, 1003) ** 3
options = [{"over": over, "cap": cap} for over in ("step", "trajectory") for cap in (None, 1.5)]
signal = {"over": "trajectory", "step_signal": maps[..., 0]}
torch.save([allocate(maps, layout="bsgp", strength=0.3, **o) for o in [*options, signal]], sys.argv[1])
"""


@pytest.mark.exhaustive
@pytest.mark.native
def test_allocation_bits_do_not_depend_on_the_instruction_set(tmp_path: Path) -> None:
    found = []
    for isa in native.cpu().runnable_isas().split():
        file = tmp_path / isa
        environment = {**os.environ, "STAR_KERNELS_ISA": isa}
        subprocess.run([sys.executable, "-c", _ALLOCATIONS, str(file)], env=environment, check=True)
        found.append(torch.load(file))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
