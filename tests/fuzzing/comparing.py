"""Comparison of a call with the same call in float64 and in PyTorch's float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def wide(value: Any) -> Any:
    """A copy of a tensor in float64. Other arguments, such as a Transition, are returned unchanged."""
    if isinstance(value, Tensor):
        return value.detach().double().contiguous() if value.is_floating_point() else value.clone()
    return value


def plain(value: Any) -> Any:
    """A contiguous copy of a tensor. Other arguments are returned unchanged."""
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def check(
    name: str,
    got: Tensor,
    eager: Tensor,
    exact: Tensor,
    least: float = 0.0,
    slack: float = 1.0,
    ignored: Tensor | None = None,
) -> None:
    """Checks that the error is at most a few times that of PyTorch in float32 plus the rounding error.

    NaN and infinity must be at the same positions.

    Args:
        name: name of the result in errors.
        got: the result.
        eager: the result in PyTorch's float32.
        exact: the result in float64.
        least: size of the terms of a sum that may cancel.
        slack: factor of the allowed rounding error.
        ignored: marks elements at a discontinuity of the function.
    """
    assert got.shape == exact.shape, f"{name} has shape {list(got.shape)}, expected {list(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got.isnan(), exact.isnan()), f"{name} has NaN at other positions"
    assert torch.equal(got.isinf(), exact.isinf()), f"{name} is infinite at other positions"
    size = float(exact[finite].abs().max()) if bool(finite.any()) else 0.0
    rounding = torch.finfo(got.dtype).eps * (exact.abs() + size / 4)
    allowed = slack * (rounding + 128 * torch.finfo(torch.float32).eps * max(least, size))
    error, eager_error = (got.double() - exact).abs(), (eager.double() - exact).abs()
    if ignored is not None:
        finite = finite & ~ignored
    if bool(finite.any()):
        allowed = allowed + 8 * float(eager_error[finite].max())
        worst = (error - allowed).masked_fill(~finite, -torch.inf)
        at = int(worst.argmax())
        assert float(worst.max()) <= 0, (
            f"{name}: error {float(error.flatten()[at]):.3g}, allowed {float(allowed.flatten()[at]):.3g}"
        )
