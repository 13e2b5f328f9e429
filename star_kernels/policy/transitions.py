"""The transitions of one denoising step: every sampler of the family is linear in sample and velocity, plus noise.

``prev ~ N(a x + b v, std^2)`` and ``log p = offset - scale * (prev - mean)^2``. Samplers differ only in six
coefficients, so one kernel computes them all. Sigma runs from 1 (noise) to 0 (image); arithmetic is float64, rounded
once.

One kernel computes the coefficients of ordinary arguments, in host memory or on a GPU, in a tenth of the time of
tensor operations. Those are the reference; they compute what kernels do not support and report invalid arguments. The
values of tensors on a GPU are not checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.checks import check_number, readable
from star_kernels.policy.backends import obstacle
from star_kernels.torch_internals import WATCH

ROWS = ("mean_sample", "mean_output", "std", "scale", "offset", "kl_scale")
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
_Rows = tuple[Any, ...]  # a value for each of ROWS
_EXACT = 2**53  # integers below it are exact in float64
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of a GPU's kernel
FLOW_SDE, DANCE_SDE, FLOW_CPS, FLOW_MATCHING = range(4)  # as in csrc/cpu/transitions.h


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

    found = _from_kernel(FLOW_SDE, sigma, sigma_next, sigma_max, noise_level)
    if found is not None:
        return found
    sigma, sigma_next = _sigmas(sigma, sigma_next)
    if isinstance(sigma_max, Tensor) and sigma_max.device != sigma.device:
        raise ValueError(f"sigma_max must be on the device of sigma, {sigma.device}, got {sigma_max.device}")
    top = _column("sigma_max", _wide("sigma_max", sigma_max, sigma.device), sigma, widens=False)
    _in_range("sigma_max", top, (top > 0) & (top < 1), "lie strictly between 0 and 1")
    s = noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, top, sigma)))
    return _stack(_gaussian(sigma, sigma_next, s))


def dance_sde(sigma: Tensor | float, sigma_next: Tensor | float, *, eta: float = 0.3) -> Transition:
    """DanceGRPO's SDE step (arXiv 2505.07818): the noise scale s is the constant ``eta``.

    ``mean = x + v dt - eta^2 dt score / 2`` with ``score = -(x + (1 - sigma) v) / sigma``; ``std = eta sqrt(-dt)``.
    Arguments and errors as in :func:`flow_sde`; eta is positive.
    """
    _positive("eta", eta)

    found = _from_kernel(DANCE_SDE, sigma, sigma_next, 0.0, eta)
    if found is not None:
        return found
    sigma, sigma_next = _sigmas(sigma, sigma_next)
    return _stack(_gaussian(sigma, sigma_next, torch.full_like(sigma, eta)))


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

    found = _from_kernel(FLOW_CPS, sigma, sigma_next, 0.0, noise_level)
    if found is not None:
        return found
    sigma, sigma_next = _sigmas(sigma, sigma_next)
    s = sigma_next * math.sin(noise_level * math.pi / 2)
    kept = sigma_next * math.cos(noise_level * math.pi / 2)  # sqrt(sigma_next^2 - s^2)
    mean_output = (1 - sigma) * kept - sigma * (1 - sigma_next)
    return _stack((1 - sigma_next + kept, mean_output, s, 1.0, 0.0, 0.5 / (s * s)))


def flow_matching(sigma: Tensor | float, *, weight: Tensor | float | None = None) -> Transition:
    """Advantage-weighted flow matching: ``log p = -weight (target - v)^2``, without a sampler.

    Pass the velocity target ``eps - x0`` as ``prev_sample``. Weighted matching is a Gaussian policy with mean v and
    variance ``1 / (2 weight)``.

    Args:
        sigma: noise level of the training sample, ``[]`` or ``[B]``, above 0 and at most 1; its shape is the batch.
        weight: positive, ``[]`` or ``[B]``; 1 by default.
    """
    found = _from_kernel(FLOW_MATCHING, sigma, 0.0, 1.0 if weight is None else weight, 0.0)
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
    return _stack((0.0, 1.0, 1 / torch.sqrt(2 * w), w, 0.0, w))  # variance 1 / (2 weight)


def _gaussian(sigma: Tensor, sigma_next: Tensor, s: Tensor) -> _Rows:
    """The reverse SDE of the flow with noise scale s, discretised by Euler-Maruyama, and its Gaussian density."""
    dt = sigma_next - sigma
    std = s * torch.sqrt(-dt)
    drift = s * s / (2 * sigma)
    return (
        1 + drift * dt,
        (1 + drift * (1 - sigma)) * dt,
        std,
        0.5 / (std * std),
        -torch.log(std) - _LOG_SQRT_2PI,
        0.5 / (s * s),
    )


def _stack(rows: _Rows) -> Transition:
    like = next(row for row in rows if isinstance(row, Tensor))
    return Transition(
        torch.stack([row if isinstance(row, Tensor) else torch.full_like(like, row) for row in rows]).float()
    )


def _from_kernel(
    formula: int, sigma: Tensor | float, sigma_next: Tensor | float, other: Tensor | float, level: float
) -> Transition | None:
    """The transition from one kernel, or None if tensor operations compute it or report an error.

    That is the case if a mode, trace or transform needs to see the call, for tensors that require a gradient, and if an
    argument is not accepted.

    Args:
        other: sigma_max or the weight; not used by other formulas.
        level: noise_level or eta.
    """
    if torch.compiler.is_compiling() or WATCH.observed():
        return None
    batch, like = 1, None
    for position, value in enumerate((sigma, sigma_next, other)):
        if isinstance(value, float) or (isinstance(value, int) and abs(value) < _EXACT):
            continue
        if type(value) is not Tensor or value.requires_grad or value.layout is not torch.strided or value.ndim > 1:
            return None
        if value.is_neg() or not value.is_floating_point():
            return None
        if like is None:
            if position == 2:
                return None  # the checks of tensors compare its device with the default device
            like = value
        elif value.device != like.device:
            return None
        if position < 2:
            batch = max(batch, value.numel())
    arguments = (formula, sigma, sigma_next, other, float(level))
    table = _on_host(arguments, batch, like) if like is None or like.is_cpu else _on_device(arguments, batch, like)
    return None if table is None else Transition(table)


def _on_host(arguments: tuple[Any, ...], batch: int, like: Tensor | None) -> Tensor | None:
    """The table of coefficients from the library; without a tensor among the arguments it is on the default device."""
    library = native.cpu()
    if library is None:
        return None
    table = torch.empty((len(ROWS), batch), dtype=torch.float32, device=None if like is None else "cpu")
    host = table if table.is_cpu else torch.empty_like(table, device="cpu")
    if not library.transition(*arguments, host):
        return None
    return table if host is table else table.copy_(host)


def _on_device(arguments: tuple[Any, ...], batch: int, like: Tensor) -> Tensor | None:
    """The table of coefficients from a Triton kernel."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if not like.is_cuda or any(t.numel() not in (1, batch) or t.dtype not in _DTYPES for t in tensors):
        return None
    if obstacle("triton", "cuda", torch.float32):
        return None
    from star_kernels.policy import triton_transitions

    table = torch.empty((len(ROWS), batch), dtype=torch.float32, device=like.device)
    triton_transitions.transition(table, *arguments)
    return table


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
