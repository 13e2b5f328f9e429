"""The same call in float64, in PyTorch's float32 and as it is, and how far apart they may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def wide(value: Any) -> Any:
    """The argument in float64, in memory of its own; a Transition stays what it is."""
    if isinstance(value, Tensor):
        return value.detach().double().contiguous() if value.is_floating_point() else value.clone()
    return value


def plain(value: Any) -> Any:
    """The argument in memory of its own."""
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
    """Within a few times the error of PyTorch's float32, rounding on top; NaN and infinity where they belong.

    ``least`` is the size of the terms of a sum that may cancel; ``slack`` a factor of the rounding; ``ignored`` marks
    elements at a jump of the function.
    """
    assert got.shape == exact.shape, f"{name} has shape {list(got.shape)}, not {list(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got.isnan(), exact.isnan()), f"{name} has NaN in other places"
    assert torch.equal(got.isinf(), exact.isinf()), f"{name} is infinite in other places"
    size = float(exact[finite].abs().max()) if bool(finite.any()) else 0.0
    rounding = torch.finfo(got.dtype).eps * (exact.abs() + size / 4)
    allowed = slack * (rounding + 128 * torch.finfo(torch.float32).eps * max(least, size))
    error, reference = (got.double() - exact).abs(), (eager.double() - exact).abs()
    if ignored is not None:
        finite = finite & ~ignored
    if bool(finite.any()):
        allowed = allowed + 8 * float(reference[finite].max())
        worst = (error - allowed).masked_fill(~finite, -torch.inf)
        at = int(worst.argmax())
        assert float(worst.max()) <= 0, (
            f"{name}: error {float(error.flatten()[at]):.3g}, allowed {float(allowed.flatten()[at]):.3g}"
        )
