"""Flow-GRPO's formulas as published, in eager float32, and rollouts in the layouts of its training scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

BATCH = 4
LAYOUTS = {  # latents at 128 or 256 pixels
    "sd3": (BATCH, 16, 16, 16),
    "flux": (BATCH, 256, 64),
    "qwen_image": (BATCH, 144, 64),
    "wan": (BATCH, 16, 3, 8, 12),
}


def scheduler(layout: str = "sd3", steps: int = 10) -> FlowMatchEulerDiscreteScheduler:
    """The schedule of a family's pipeline: shift 3 for SD3 and Wan, else a shift by the sequence length."""
    if layout in ("sd3", "wan"):
        made = FlowMatchEulerDiscreteScheduler(shift=3.0)
        made.set_timesteps(steps)
    else:
        terminal = {"shift_terminal": 0.02} if layout == "qwen_image" else {}
        made = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **terminal)
        sigmas = [1 - i / steps for i in range(steps)]
        made.set_timesteps(sigmas=sigmas, mu=0.65)
    return made


@dataclass
class Written:
    prev_sample: Tensor
    log_prob: Tensor  # of every element
    mean: Tensor
    std_dev_t: Tensor
    sqrt_dt: Tensor

    @property
    def log_prob_mean(self) -> Tensor:
        return self.log_prob.flatten(1).mean(dim=1)


def written_step(
    made: Any,
    v: Tensor,
    timestep: Tensor,
    x: Tensor,
    *,
    noise_level: float = 0.7,
    sde_type: str = "sde",
    noise: Tensor | None = None,
    prev: Tensor | None = None,
) -> Written:
    """One step from noise or to a given latent, with the scheduler's own index_for_timestep."""
    index = torch.tensor([made.index_for_timestep(t) for t in timestep])
    shape = (-1, *[1] * (x.ndim - 1))
    sigma, following = made.sigmas[index].view(shape), made.sigmas[index + 1].view(shape)
    dt = following - sigma
    sqrt_dt = torch.sqrt(-dt)
    if sde_type == "sde":
        s = noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, made.sigmas[1], sigma)))
        mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        std = s * sqrt_dt
    else:
        s = std = following * math.sin(noise_level * math.pi / 2)
        x0, x1 = x - sigma * v, x + (1 - sigma) * v
        mean = (1 - following) * x0 + torch.sqrt(following**2 - s**2) * x1
    if prev is None:
        prev = (mean + std * noise).detach()
    squares = (prev - mean) ** 2
    constant = torch.log(std) + 0.5 * math.log(2 * math.pi)
    log_prob = -squares / (2 * std**2) - constant if sde_type == "sde" else -squares
    return Written(prev, log_prob, mean, s, sqrt_dt)


def written_loss(
    new: Written,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1e-4,
    adv_clip_max: float = 5.0,
    beta: float = 0.0,
    reference: Written | None = None,
    old_mean: Tensor | None = None,
) -> Tensor:
    """The loss of the scripts from log-probabilities; with ``old_mean`` GRPO-Guard's, for each sample."""
    log_ratio = new.log_prob_mean - old_log_prob
    if old_mean is not None:
        scale = (new.sqrt_dt * new.std_dev_t).flatten()
        drift = ((new.mean - old_mean) ** 2).flatten(1).mean(dim=1)
        log_ratio = (log_ratio + drift / (2 * scale**2)) * scale
    ratio = torch.exp(log_ratio)
    a = advantages.clamp(-adv_clip_max, adv_clip_max)
    each = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip_range, 1 + clip_range))
    if old_mean is not None:
        each = each / (new.sqrt_dt**2).flatten()
    loss = each.mean()
    if reference is not None:
        rest = tuple(range(1, new.mean.ndim))
        squares = ((new.mean - reference.mean) ** 2).mean(dim=rest, keepdim=True)
        loss = loss + beta * (squares / (2 * new.std_dev_t**2)).mean()
    return loss


@dataclass
class Rollout:
    """One step of a batch, sampled by the formulas with an old model, and the velocity of a new model."""

    made: Any
    timestep: Tensor
    sample: Tensor
    noise: Tensor
    old_v: Tensor
    new_v: Tensor
    ref_v: Tensor
    old: Written
    advantages: Tensor
    noise_level: float
    sde_type: str

    @property
    def settings(self) -> dict[str, Any]:
        return {"noise_level": self.noise_level, "sde_type": self.sde_type}

    def written(self, v: Tensor) -> Written:
        return written_step(self.made, v, self.timestep, self.sample, prev=self.old.prev_sample, **self.settings)


def rollout(
    layout: str = "sd3",
    sde_type: str = "sde",
    *,
    steps: tuple[int, ...] = (0, 2, 5, 8),
    drift: float = 1.0,
    advantages: tuple[float, ...] = (1.5, -0.7, -9.0, -0.2),
) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    shape = (len(steps), *LAYOUTS[layout][1:])
    old_v, change, other, x, noise = (torch.randn(shape, generator=generator) for _ in range(5))
    made = scheduler(layout)
    timestep = made.timesteps[list(steps)]
    noise_level = 0.7 if sde_type == "sde" else 0.8
    old = written_step(made, old_v, timestep, x, noise_level=noise_level, sde_type=sde_type, noise=noise)
    return Rollout(
        made, timestep, x, noise, old_v, old_v + drift * change, old_v + other, old,
        torch.tensor(advantages), noise_level, sde_type,
    )  # fmt: skip


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Asserts equal shapes and a small error relative to the norm of the whole tensor."""
    assert got.shape == expected.shape
    assert bool(got.isfinite().all())
    got, expected = got.detach().double(), expected.detach().double()
    error = float((got - expected).norm() / expected.norm())
    assert error <= tolerance, f"relative error {error:.3g}"
