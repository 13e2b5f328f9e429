"""The transitions of a diffusers flow-matching scheduler by timestep, without host syncs.

``scheduler.index_for_timestep`` causes a host sync for every sample of every step. Here the coefficients of all steps
are computed once for each schedule and stored on the device of the latents, where a timestep selects its column.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from star_kernels.policy import Transition, flow_cps, flow_sde

SDE_TYPES = ("sde", "cps")


class Step(NamedTuple):
    """The step of each sample of a batch, or one step for all of them."""

    transition: Transition
    std_dev_t: Tensor  # [B]: Flow-GRPO's noise scale; times sqrt(-dt) ("sde") or as is ("cps") the std
    sqrt_dt: Tensor  # [B]: sqrt(-dt)


class _Schedule:
    """Coefficients for one call of ``set_timesteps``. Freed with its timesteps, so it must not reference them."""

    def __init__(self, sigmas: Tensor, versions: tuple[int, int]) -> None:
        self.sigmas, self.versions = sigmas, versions
        self.tables: dict[tuple[float, str, torch.device], tuple[Tensor, Tensor, Tensor]] = {}


_schedules = WeakIdKeyDictionary()  # timesteps -> _Schedule


def step_at(
    scheduler: Any, timestep: Tensor | float, like: Tensor, *, noise_level: float = 0.7, sde_type: str = "sde"
) -> Step:
    """The step that begins at a timestep, for each sample of ``like``.

    Args:
        scheduler: an object with ``timesteps`` [N] and ``sigmas`` [N + 1], such as diffusers'
            FlowMatchEulerDiscreteScheduler after ``set_timesteps``. Of equal timesteps the second is used, as in
            diffusers.
        timestep: an element of ``scheduler.timesteps``, or a tensor [B] or [1] of them. Other values give NaN, because
            an error would need a host sync.
        like: the latents, [B, ...]; the result is on their device.
        noise_level: noise level of the sampler. 0 is the deterministic step, whose log-probability is NaN for "sde", as
            in Flow-GRPO.
        sde_type: "sde" (:func:`star_kernels.flow_sde` with ``sigma_max = sigmas[1]``) or "cps"
            (:func:`star_kernels.flow_cps`).

    Raises:
        TypeError, ValueError: a scheduler without a schedule, or a wrong timestep shape, sde_type or noise_level; the
            message names the argument.
    """
    if sde_type not in SDE_TYPES:
        raise ValueError(f"sde_type must be {' or '.join(map(repr, SDE_TYPES))}, got {sde_type!r}")
    timesteps, positions, table = _tables(scheduler, float(noise_level), sde_type, like.device)
    wanted = torch.as_tensor(timestep, device=like.device).reshape(-1)
    if len(wanted) not in (1, len(like)):
        raise ValueError(
            f"timestep must have one element or {len(like)}, one for each sample, got shape {list(wanted.shape)}"
        )
    steps = len(timesteps)
    index = torch.where(wanted[:, None] == timesteps, positions, steps).amin(dim=1)  # [B]
    columns = table.index_select(1, index)  # [8, B]
    return Step(Transition(columns[:6]), columns[6], columns[7])


def _tables(scheduler: Any, noise_level: float, sde_type: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps [N], their indices [N], and the coefficients [8, N + 1] of the steps, with NaN in the last column."""
    timesteps, sigmas = _checked(scheduler)
    versions = _version(timesteps), _version(sigmas)
    schedule = _schedules.get(timesteps)
    if schedule is None or schedule.sigmas is not sigmas or schedule.versions != versions:
        schedule = _schedules[timesteps] = _Schedule(sigmas, versions)
    key = noise_level, sde_type, device
    if key not in schedule.tables:
        table = _coefficients(sigmas.detach(), noise_level, sde_type)
        table = table.index_select(1, _second_of_equals(timesteps.to(sigmas.device)))
        table = torch.cat([table, torch.full_like(table[:, :1], math.nan)], dim=1)
        schedule.tables[key] = (
            timesteps.detach().to(device),  # not the key itself, which would then never be freed
            torch.arange(len(timesteps), device=device),
            table.to(device),
        )
    found: tuple[Tensor, Tensor, Tensor] = schedule.tables[key]
    return found


def _coefficients(sigmas: Tensor, noise_level: float, sde_type: str) -> Tensor:
    """float32 [8, N]: the six coefficients of a Transition, Flow-GRPO's std_dev_t, and sqrt(-dt)."""
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    dt = sigma_next.double() - sigma.double()
    sqrt_dt = torch.sqrt(-dt)
    if noise_level == 0:
        rows = _deterministic(dt, sde_type)
        std_dev_t = torch.zeros_like(dt)
    elif sde_type == "sde":
        rows = flow_sde(sigma, sigma_next, noise_level=noise_level, sigma_max=sigmas[1]).coefficients
        std_dev_t = rows[2] / sqrt_dt
    else:
        rows = flow_cps(sigma, sigma_next, noise_level=noise_level).coefficients
        std_dev_t = rows[2]
    return torch.cat([rows, torch.stack([std_dev_t, sqrt_dt]).float()])


def _deterministic(dt: Tensor, sde_type: str) -> Tensor:
    """``x + v dt`` without noise. The log-probability is NaN for the SDE; that of Flow-CPS needs no density."""
    one = torch.ones_like(dt)
    scale, offset = (one, 0 * one) if sde_type == "cps" else (math.nan * one, math.nan * one)
    return torch.stack([one, dt, 0 * one, scale, offset, math.inf * one]).float()


def _second_of_equals(timesteps: Tensor) -> Tensor:
    """For each timestep the index of its step: of equal timesteps diffusers uses the second."""
    steps = len(timesteps)
    positions = torch.arange(steps, device=timesteps.device)
    found = torch.where(timesteps[:, None] == timesteps, positions, steps).sort(dim=1).values[:, :2]
    return torch.where(found < steps, found, -1).amax(dim=1)


def _checked(scheduler: Any) -> tuple[Tensor, Tensor]:
    timesteps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
    if getattr(getattr(scheduler, "config", None), "solver_order", None) is not None:
        raise ValueError(
            "scheduler must be one whose steps Flow-GRPO's samplers take, such as FlowMatchEulerDiscreteScheduler, got "
            f"the solver {type(scheduler).__name__}; Flow-GRPO's script for Wan has a sampler of its own"
        )
    if not isinstance(timesteps, Tensor) or not isinstance(sigmas, Tensor):
        raise TypeError(
            "scheduler must have tensors timesteps and sigmas, like FlowMatchEulerDiscreteScheduler, "
            f"got {type(scheduler).__name__}"
        )
    if timesteps.ndim != 1 or sigmas.ndim != 1 or len(sigmas) != len(timesteps) + 1 or len(timesteps) == 0:
        raise ValueError(
            "scheduler must have timesteps [N] and sigmas [N + 1] (call its set_timesteps), got "
            f"{list(timesteps.shape)} and {list(sigmas.shape)}"
        )
    return timesteps, sigmas


def _version(tensor: Tensor) -> int:
    """The version counter, which changes with the values; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version
