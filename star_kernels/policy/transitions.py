"""The transitions of one denoising step: every sampler of the family is linear in sample and velocity, plus noise.

``prev ~ N(a x + b v, std^2)`` and ``log p = offset - scale * (prev - mean)^2``. Samplers differ only in six
coefficients, so one kernel computes them all. Sigma runs from 1 (noise) to 0 (image); arithmetic is float64, rounded
once.

Each formula is written once, for floats and for tensors. Python computes the coefficients of a few numbers in host
memory, in a tenth of the time of tensor operations. Tensors on a GPU are not read. Invalid values are reported by the
checks of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_kernels.checks import check_number, readable
from star_kernels.torch_internals import WATCH

ROWS = ("mean_sample", "mean_output", "std", "scale", "offset", "kl_scale")
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
_Rows = tuple[Any, ...]  # a value for each of ROWS
_FEW = 16  # columns that are computed in Python; tensor operations are faster for more


@dataclass(frozen=True, eq=False)
class Transition:
    """Coefficients of one step, a column for each sample of a batch or one column for all samples.

    Args:
        coefficients: float32 ``[6, B]`` or ``[6, 1]``, with the rows
            a (``mean_sample``) and b (``mean_output``) of the mean ``a x + b v``;
            ``std`` of the noise;
            ``scale`` and ``offset`` of the log-probability;
            ``kl_scale``, the factor of ``(mean - mean_ref)^2`` in the KL penalty: 1 / (2 s^2) for the samplers
            (as in Flow-GRPO, without dt), the loss weight for flow matching.
    """

    coefficients: Tensor

    def __post_init__(self) -> None:
        table = self.coefficients
        if not isinstance(table, Tensor) or table.dtype != torch.float32:
            got = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(f"coefficients must be a float32 tensor, got {got}")
        if table.ndim != 2 or table.shape[0] != len(ROWS) or table.shape[1] == 0:
            raise ValueError(f"coefficients must have shape [{len(ROWS)}, B], got {list(table.shape)}")

    @property
    def mean_sample(self) -> Tensor:
        return self.coefficients[0]

    @property
    def mean_output(self) -> Tensor:
        return self.coefficients[1]

    @property
    def std(self) -> Tensor:
        return self.coefficients[2]

    @property
    def scale(self) -> Tensor:
        return self.coefficients[3]

    @property
    def offset(self) -> Tensor:
        return self.coefficients[4]

    @property
    def kl_scale(self) -> Tensor:
        return self.coefficients[5]

    @property
    def device(self) -> torch.device:
        return self.coefficients.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Transition:
        """The same transition on another device."""
        return Transition(self.coefficients.to(device, non_blocking=non_blocking))


def flow_sde(
    sigma: Tensor | float, sigma_next: Tensor | float, *, noise_level: float = 0.7, sigma_max: Tensor | float
) -> Transition:
    """Flow-GRPO's SDE step (arXiv 2505.05470).

    ``s = noise_level sqrt(sigma / (1 - sigma*))``, with ``sigma* = sigma_max`` if sigma is 1 and sigma otherwise;
    ``mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt``; ``std = s sqrt(-dt)``.

    Args:
        sigma, sigma_next: noise levels of this step and the next, floats or tensors ``[]`` or ``[B]``,
            1 >= sigma > sigma_next >= 0.
        noise_level: positive.
        sigma_max: replaces sigma = 1, at which the SDE is singular: the second sigma of the schedule, between 0 and 1.

    Raises:
        ValueError: a value is out of range, or shapes do not match. Values of tensors on a GPU are not checked, to
            avoid a synchronisation.
    """
    _positive("noise_level", noise_level)

    def column(sigma: float, sigma_next: float, top: float) -> _Rows | None:
        if not (0 <= sigma_next < sigma <= 1 and 0 < top < 1):
            return None
        s = noise_level * math.sqrt(sigma / (1 - (top if sigma == 1 else sigma)))
        return _gaussian(math, sigma, sigma_next, s)

    found = _in_python(column, (sigma, sigma_next), sigma_max)
    if found is not None:
        return found
    sigma, sigma_next = _sigmas(sigma, sigma_next)
    if isinstance(sigma_max, Tensor) and sigma_max.device != sigma.device:
        raise ValueError(f"sigma_max must be on the device of sigma, {sigma.device}, got {sigma_max.device}")
    top = _column("sigma_max", _wide("sigma_max", sigma_max, sigma.device), sigma, widens=False)
    _in_range("sigma_max", top, (top > 0) & (top < 1), "lie strictly between 0 and 1")
    s = noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, top, sigma)))
    return _stack(_gaussian(torch, sigma, sigma_next, s))


def dance_sde(sigma: Tensor | float, sigma_next: Tensor | float, *, eta: float = 0.3) -> Transition:
    """DanceGRPO's SDE step (arXiv 2505.07818): the noise scale s is the constant ``eta``.

    ``mean = x + v dt - eta^2 dt score / 2`` with ``score = -(x + (1 - sigma) v) / sigma``; ``std = eta sqrt(-dt)``.
    Arguments and errors as in :func:`flow_sde`; eta is positive.
    """
    _positive("eta", eta)

    def column(sigma: float, sigma_next: float) -> _Rows | None:
        return _gaussian(math, sigma, sigma_next, eta) if 0 <= sigma_next < sigma <= 1 else None

    found = _in_python(column, (sigma, sigma_next))
    if found is not None:
        return found
    sigma, sigma_next = _sigmas(sigma, sigma_next)
    return _stack(_gaussian(torch, sigma, sigma_next, torch.full_like(sigma, eta)))


def flow_cps(sigma: Tensor | float, sigma_next: Tensor | float, *, noise_level: float = 0.8) -> Transition:
    """The coefficients-preserving step of Flow-CPS (arXiv 2509.05952).

    With ``x0 = x - sigma v``, ``x1 = x + (1 - sigma) v`` and ``s = sigma_next sin(noise_level pi / 2)``:
    ``mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - s^2) x1``, ``std = s``, ``log p = -(prev - mean)^2``.
    Arguments and errors as in :func:`flow_sde`; noise_level is above 0 and at most 1. At sigma_next = 0 the step is
    deterministic and the KL penalty is undefined: do not train that step with a KL penalty.
    """
    check_number("noise_level", noise_level)
    if not 0 < noise_level <= 1:
        raise ValueError(f"noise_level must be above 0 and at most 1, got {noise_level}")

    def rows(sigma: Any, sigma_next: Any) -> _Rows:
        s = sigma_next * math.sin(noise_level * math.pi / 2)
        kept = sigma_next * math.cos(noise_level * math.pi / 2)  # sqrt(sigma_next^2 - s^2)
        return (
            1 - sigma_next + kept,
            (1 - sigma) * kept - sigma * (1 - sigma_next),
            s,
            1.0,
            0.0,
            0.5 / (s * s),
        )

    def column(sigma: float, sigma_next: float) -> _Rows | None:
        return rows(sigma, sigma_next) if 0 <= sigma_next < sigma <= 1 else None

    found = _in_python(column, (sigma, sigma_next))
    return found if found is not None else _stack(rows(*_sigmas(sigma, sigma_next)))


def flow_matching(sigma: Tensor | float, *, weight: Tensor | float | None = None) -> Transition:
    """Advantage-weighted flow matching: ``log p = -weight (target - v)^2``, without a sampler.

    Pass the velocity target ``eps - x0`` as ``prev_sample``. Weighted matching is a Gaussian policy with mean v and
    variance ``1 / (2 weight)``.

    Args:
        sigma: noise level of the training sample, ``[]`` or ``[B]``, above 0 and at most 1; its shape is the batch.
        weight: positive, ``[]`` or ``[B]``; 1 by default.
    """

    def column(sigma: float, w: float) -> _Rows | None:
        return _matching(math, w) if 0 < sigma <= 1 and 0 < w < math.inf else None

    found = _in_python(column, (sigma,), 1.0 if weight is None else weight)
    if found is not None:
        return found
    sigma = _wide("sigma", sigma)
    sigma = _column("sigma", sigma, sigma)
    _in_range("sigma", sigma, (sigma > 0) & (sigma <= 1), "be above 0 and at most 1")
    if isinstance(weight, Tensor) and weight.device != sigma.device:
        raise ValueError(f"weight must be on the device of sigma, {sigma.device}, got {weight.device}")
    w = _wide("weight", 1.0 if weight is None else weight, sigma.device)
    _, w = torch.broadcast_tensors(sigma, _column("weight", w, sigma, widens=False))
    _in_range("weight", w, (w > 0) & w.isfinite(), "be positive and finite")
    return _stack(_matching(torch, w))


def _gaussian(library: Any, sigma: Any, sigma_next: Any, s: Any) -> _Rows:
    """The reverse SDE of the flow with noise scale s, discretised by Euler-Maruyama, and its Gaussian density."""
    dt = sigma_next - sigma
    std = s * library.sqrt(-dt)
    drift = s * s / (2 * sigma)
    return (
        1 + drift * dt,
        (1 + drift * (1 - sigma)) * dt,
        std,
        0.5 / (std * std),
        -library.log(std) - _LOG_SQRT_2PI,
        0.5 / (s * s),
    )


def _matching(library: Any, weight: Any) -> _Rows:
    """A Gaussian with mean v and variance 1 / (2 weight), without the constant of its density."""
    return (0.0, 1.0, 1 / library.sqrt(2 * weight), weight, 0.0, weight)


def _stack(rows: _Rows) -> Transition:
    like = next(row for row in rows if isinstance(row, Tensor))
    return Transition(
        torch.stack([row if isinstance(row, Tensor) else torch.full_like(like, row) for row in rows]).float()
    )


def _in_python(
    column: Callable[..., _Rows | None], batch: tuple[Tensor | float, ...], *others: Tensor | float
) -> Transition | None:
    """The transition of a few numbers in host memory, computed column by column in Python.

    None if the values cannot be read or are too many, if shapes do not match, if ``column`` returns None for an invalid
    value, or if Python raises an error for a division by zero or an overflow, which are infinite in tensors.
    """
    if torch.compiler.is_compiling() or WATCH.observed():
        return None
    values = [_floats(value) for value in (*batch, *others)]
    if not all(values):
        return None
    size = max([len(numbers) for numbers in values[: len(batch)]])
    if not all([len(numbers) in (1, size) for numbers in values]):
        return None
    on_cpu = any([isinstance(value, Tensor) for value in batch])
    if not on_cpu and any([isinstance(value, Tensor) for value in others]):
        return None  # the checks of tensors compare its device with the default device
    try:
        columns = [column(*numbers) for numbers in zip(*[n * (size // len(n)) for n in values], strict=True)]
    except (ArithmeticError, ValueError):
        return None
    if None in columns:
        return None
    rows = list(zip(*columns, strict=True))
    return Transition(torch.tensor(rows, dtype=torch.float32, device="cpu" if on_cpu else None))


def _floats(value: Tensor | float) -> list[float]:
    """A number, or the elements of a small floating-point tensor in host memory; an empty list for anything else."""
    if isinstance(value, float | int):
        return [value]
    if type(value) is not Tensor or not value.is_cpu or not value.is_floating_point():
        return []
    if value.requires_grad or value.layout is not torch.strided or value.ndim > 1 or value.numel() > _FEW:
        return []
    return value.tolist() if value.ndim else [value.item()]


def _sigmas(sigma: Tensor | float, sigma_next: Tensor | float) -> tuple[Tensor, Tensor]:
    """Both as float64 ``[B]`` (or ``[1]``) on one device, in range."""
    if isinstance(sigma, Tensor) and isinstance(sigma_next, Tensor) and sigma.device != sigma_next.device:
        raise ValueError(f"sigma_next must be on the device of sigma, {sigma.device}, got {sigma_next.device}")
    device = next((s.device for s in (sigma, sigma_next) if isinstance(s, Tensor)), None)
    first = _wide("sigma", sigma, device)
    then = _column("sigma_next", _wide("sigma_next", sigma_next, device), first)
    first = _column("sigma", first, first)
    first, then = torch.broadcast_tensors(first, then)
    _in_range("sigma", first, (first > 0) & (first <= 1), "be above 0 and at most 1")
    _in_range("sigma_next", then, (then >= 0) & (then < first), "be at least 0 and below sigma")
    return first, then


def _wide(name: str, value: Tensor | float, device: torch.device | None = None) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a float or a tensor of floats, got {value!r}") from None


def _column(name: str, value: Tensor, sigma: Tensor, *, widens: bool = True) -> Tensor:
    """``[]`` or ``[B]`` as ``[1]`` or ``[B]``; B is that of sigma, or any if sigma is one number."""
    if not widens and value.numel() not in (1, sigma.numel()):
        shape = f"[] or [B] = [{sigma.numel()}]"
        raise ValueError(f"{name} must be a float or have shape {shape}, got {list(value.shape)}")
    if (
        value.ndim > 1
        or (value.ndim == 1 and sigma.ndim == 1 and 1 < len(value) != len(sigma) > 1)
        or not value.numel()
    ):
        expected = f"[] or [B] = [{len(sigma)}]" if sigma.ndim == 1 and value is not sigma else "[] or [B]"
        raise ValueError(f"{name} must be a float or have shape {expected}, got {list(value.shape)}")
    return value.reshape(-1)


def _positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _in_range(name: str, value: Tensor, good: Tensor, requirement: str) -> None:
    """Raises unless all values are good; does not read values of a GPU, which would synchronise."""
    if readable(value) and not bool(good.all()):
        raise ValueError(f"{name} must {requirement}, got {value[~good].flatten()[0].item():g}")
