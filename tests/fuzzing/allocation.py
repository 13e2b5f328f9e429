"""Random calls of allocate."""

from __future__ import annotations

import math
from typing import Any

import torch
from fuzzing.comparing import DTYPES
from fuzzing.memory import Draw
from torch import Tensor

from star_kernels import allocate


def allocation_arguments(draw: Draw) -> dict[str, Any]:
    shape = (draw.randint(1, 4), draw.randint(1, 80)) if draw.chance(0.5) else (draw.randint(1, 3), 4, draw.size(40))
    values = draw.uniform_tensor(*shape) ** draw.choice([0.5, 1, 4, 30])
    values = values * (draw.uniform_tensor(*shape) < draw.choice([0.3, 1.0, 1.0]))
    values = (values * 10.0 ** draw.choice([-30, -4, 0, 4, 30])).to(draw.choice([*DTYPES, torch.float64]))
    if draw.chance(0.2):
        values.view(-1)[draw.randrange(values.numel())] = draw.choice([math.nan, math.inf, -math.inf, -1.0])
    over = draw.choice(["step", "trajectory"]) if len(shape) == 3 else "step"
    arguments = {
        "maps": draw.place("maps", values),
        "strength": draw.choice([0, 0.25, 0.5, 1, 1.0]),
        "over": over,
        "cap": draw.choice([None, None, 1.01, 1.5, 3, 20.0]),
    }
    if len(shape) == 3:
        arguments["layout"] = "bsp"
    if over == "trajectory" and draw.chance(0.5):
        arguments["step_signal"] = _signal(draw, shape[:2])
    return arguments


def _signal(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    values = draw.uniform_tensor(*shape) * (draw.uniform_tensor(*shape) < draw.choice([0.5, 1.0]))
    values = (values * 10.0 ** draw.choice([-30, 0, 30])).to(draw.choice([*DTYPES, torch.float64]))
    if draw.chance(0.2):
        values.view(-1)[draw.randrange(values.numel())] = draw.choice([math.nan, math.inf, -1.0])
    return draw.place("step_signal", values)


def written(
    maps: Tensor,
    strength: float,
    over: str,
    cap: float | None,
    layout: str = "bp",
    step_signal: Tensor | None = None,
) -> Tensor:
    """The formula in float64 for each map; the factor of capped weights is found by bisection."""
    size = math.prod(maps.shape[-2:]) if over == "trajectory" else maps.shape[-1]
    weights = []
    for number, values in enumerate(maps.double().reshape(-1, size)):
        if step_signal is None:
            relative = _relative(values)
        else:
            steps = values.view(maps.shape[-2:])
            relative = torch.cat([_relative(step) for step in steps])
            relative = relative * _relative(step_signal[number].double()).repeat_interleave(maps.shape[-1])
        weight = (1 - strength) + strength * relative
        if cap is not None:
            low, high = 0.0, 700.0  # bounds of the logarithm of the factor
            for _ in range(60):
                middle = (low + high) / 2
                enough = float((math.exp(middle) * weight).clamp(max=cap).mean()) >= 1
                low, high = (low, middle) if enough else (middle, high)
            weight = (math.exp(high) * weight).clamp(max=cap)
            excess = size - float(weight.sum())
            if excess > 1e-6 * size:  # all positive weights are at the cap
                weight = torch.where(weight == 0, excess / max(1, int((weight == 0).sum())), weight)
        weights.append(weight)
    return torch.stack(weights).reshape(maps.shape)


def _relative(values: Tensor) -> Tensor:
    """Values divided by their mean, or ones if they are degenerate."""
    bad = not bool(values.isfinite().all()) or bool((values < 0).any()) or not bool(values.any())
    if bad:
        return torch.ones_like(values)
    return values / values.max() / (values / values.max()).mean()


def allocation(draw: Draw) -> None:
    arguments = allocation_arguments(draw)
    weights = allocate(**arguments)
    maps = arguments["maps"]
    assert weights.dtype == (torch.float64 if maps.dtype == torch.float64 else torch.float32)
    exact = written(**arguments)
    assert bool((weights >= 0).all())
    error = (weights.double() - exact).abs()
    least = 2e-5 if arguments["cap"] is None else 2e-4  # the weights below a cap come from a small difference
    assert bool((error <= 2e-5 * exact + least).all()), f"weights: error {float(error.max()):.3g}"
