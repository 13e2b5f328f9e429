"""The Triton kernel of transitions: in Triton's interpreter, on a GPU, and compiled ahead of time.

test_triton_policy.py calls the test of the interpreter in its process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import inner, outer

from star_kernels import Transition, dance_sde, flow_cps, flow_matching, flow_sde
from star_kernels.policy import transitions

triton = pytest.importorskip("triton")

from triton.compiler import ASTSource  # noqa: E402

from star_kernels.policy import triton_transitions  # noqa: E402
from tools.compile_report import NVIDIA, TARGETS, resources  # noqa: E402

# name -> the function, the number of the formula, and its last two arguments
FORMULAS: dict[str, tuple[Callable[..., Transition], int, Any, float]] = {
    "flow_sde": (
        lambda s, n: flow_sde(s, n, noise_level=0.7, sigma_max=0.9375),
        transitions.FLOW_SDE,
        0.9375,
        0.7,
    ),
    "dance_sde": (dance_sde, transitions.DANCE_SDE, 0.0, 0.3),
    "flow_cps": (flow_cps, transitions.FLOW_CPS, 0.0, 0.8),
    "flow_matching": (lambda s, n: flow_matching(s, weight=n), transitions.FLOW_MATCHING, None, 0.0),
}
COLUMNS = 70  # of two programs, one of them partial
SIGMA = torch.linspace(1.0, 0.05, COLUMNS, dtype=torch.float64)
# sigma and sigma_next: tensors of every dtype, strides, one element for all columns, numbers
ARGUMENTS: dict[str, tuple[Tensor | float, Tensor | float]] = {
    "float64": (SIGMA, 0.75 * SIGMA),
    "float32": (SIGMA.float(), 0.75 * SIGMA.float()),
    "half": (SIGMA.half(), 0.5 * SIGMA.bfloat16()),
    "strided": (SIGMA.repeat_interleave(2)[::2], (0.75 * SIGMA).expand(3, COLUMNS).T[:, 1]),
    "one": (SIGMA[3:4], 0.5 * SIGMA[3]),
    "numbers": (torch.tensor(0.9), 1 / 3),
    "tiny": (SIGMA[:5], 1e-30),
}


@inner
def test_the_kernel_rounds_the_reference_once() -> None:
    for name, (make, formula, other, level) in FORMULAS.items():
        for given, (sigma, following) in ARGUMENTS.items():
            expected = make(sigma, following).coefficients
            table = torch.full_like(expected, math.nan)
            if name == "flow_matching":
                triton_transitions.transition(table, formula, sigma, 0.0, following, level)
            else:
                triton_transitions.transition(table, formula, sigma, following, other, level)
            torch.testing.assert_close(table, expected, rtol=2**-23, atol=0, msg=lambda m, c=(name, given): f"{c}: {m}")


@outer
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
@pytest.mark.parametrize("given", ARGUMENTS)
@pytest.mark.parametrize("name", FORMULAS)
def test_on_a_gpu_a_call_is_one_launch(name: str, given: str) -> None:
    make = FORMULAS[name][0]
    on_gpu = [value.cuda() if isinstance(value, Tensor) else value for value in ARGUMENTS[given]]
    found = make(*on_gpu).coefficients
    torch.testing.assert_close(found.cpu(), make(*ARGUMENTS[given]).coefficients, rtol=2**-23, atol=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        make(*on_gpu)
    assert len([event for event in profile.events() if event.device_type.name == "CUDA"]) == 1


@outer
@pytest.mark.parametrize("architecture", NVIDIA)
@pytest.mark.parametrize("name", FORMULAS)
def test_it_compiles_and_computes_in_float64(name: str, architecture: str) -> None:
    kernel = triton_transitions.transition_kernel
    kinds: dict[str, str] = dict.fromkeys(triton_transitions.NUMBERS, "i64")
    kinds |= dict.fromkeys(triton_transitions.SIZES, "i32")
    kinds |= {"p_sigma": "*fp32", "p_next": "*fp64", "p_other": "constexpr", "p_table": "*fp32"}
    kinds |= {"FORMULA": "constexpr", "BLOCK": "constexpr"}
    source = ASTSource(
        fn=kernel,
        signature={argument: kinds[argument] for argument in kernel.arg_names},
        constexprs={"p_other": None, "FORMULA": FORMULAS[name][1], "BLOCK": triton_transitions.BLOCK},
    )
    compiled = triton.compile(source, target=TARGETS[architecture], options=triton_transitions.LAUNCH)
    assert resources(compiled)[1] == 0  # no stack
    ptx = compiled.asm["ptx"]
    assert not re.findall(r"(?:add|sub|mul|fma|div|sqrt|rcp|lg2)[.\w]*\.f32\b", ptx)
    assert len(re.findall(r"cvt\.rn\.f32\.f64", ptx)) >= (1 if name == "flow_matching" else 4)
    if name in ("flow_sde", "dance_sde"):
        assert "ED67F1C864BEB4" in ptx  # log(2 pi) / 2 has all its digits
