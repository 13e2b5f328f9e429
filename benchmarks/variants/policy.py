"""The policy loss and its gradient: ours, and Flow-GRPO's arithmetic in eager PyTorch and with torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing.harness import Variant
from star_kernels import PolicyLoss, Transition, flow_sde, sample_transition, weighted_policy_loss

CLIP_RANGE = 1e-4
ADVANTAGE_CLIP = 5.0
NOISE_LEVEL = 0.7
GRID = 2  # latent positions per patch along each axis


@dataclass(frozen=True)
class Inputs:
    """The inputs of one training step. Only the model output requires grad."""

    model_output: Tensor  # [B, C, H, W], float32 or bfloat16
    sample: Tensor  # [B, C, H, W], float32 like all other tensors
    prev_sample: Tensor  # [B, C, H, W]
    old_log_prob: Tensor  # [B, H, W]
    advantages: Tensor  # [B]
    weights: Tensor  # [B, H / 2, W / 2], mean one
    sigma: Tensor  # [B]
    sigma_next: Tensor  # [B]
    sigma_max: float
    transition: Transition

    @property
    def old_log_prob_mean(self) -> Tensor:
        """[B]: the mean over locations, which Flow-GRPO stores."""
        return self.old_log_prob.flatten(1).mean(dim=1)


def make_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs with ratios close to one, so that no sample is clipped and every gradient has to be computed."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, height, width = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    model_output, sample = normal(*shape).to(dtype), normal(*shape)
    schedule = torch.linspace(1.0, 0.0, 11)
    step = torch.arange(batch) % (len(schedule) - 2)  # the last step is not trained
    sigma, sigma_next = schedule[step].to(device), schedule[step + 1].to(device)
    sigma_max = float(schedule[1])
    transition = flow_sde(sigma, sigma_next, noise_level=NOISE_LEVEL, sigma_max=sigma_max)
    prev_sample, old = sample_transition(model_output, sample, transition, noise=normal(*shape))
    weights = torch.rand(batch, height // GRID, width // GRID, generator=generator).to(device)
    weights = weights / weights.mean(dim=(1, 2), keepdim=True)
    return Inputs(
        model_output.requires_grad_(),
        sample,
        prev_sample,
        old + 1e-5 * normal(batch, 1, 1),
        normal(batch),
        weights,
        sigma,
        sigma_next,
        sigma_max,
        transition,
    )


def _loss(x: Inputs, weights: Tensor | None, model_output: Tensor) -> PolicyLoss:
    return weighted_policy_loss(
        model_output,
        x.sample,
        x.prev_sample,
        x.old_log_prob,
        x.advantages,
        x.transition,
        weights=weights,
        clip_range=CLIP_RANGE,
        advantage_clip=ADVANTAGE_CLIP,
    )


def ours(x: Inputs, weights: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient and metrics, by autograd."""
    loss, metrics = _loss(x, weights, x.model_output)
    return loss, torch.autograd.grad(loss, x.model_output)[0], metrics


def ours_directly(x: Inputs) -> Callable[[], Tensor]:
    """A call that computes the gradient without weights by ``PolicyLoss.backward``, as the documentation recommends."""
    output = x.model_output.view_as(x.model_output)  # no leaf, like that of a model: a leaf would copy its gradient

    def run() -> Tensor:
        x.model_output.grad = None
        _loss(x, None, output).backward()
        assert x.model_output.grad is not None
        return x.model_output.grad

    return run


def flow_grpo_step(
    model_output: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: float,
    prev_sample: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Flow-GRPO's SDE step and log-probability (arXiv 2505.05470) in eager PyTorch, as in its trainer.

    Returns ``prev_sample``, which is drawn with ``noise`` if it is None, and its log-probability [B].
    """
    v, x = model_output.float(), sample.float()
    sigma, sigma_next = (s.view(-1, *[1] * (sample.ndim - 1)) for s in (sigma, sigma_next))
    dt = sigma_next - sigma
    s = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * NOISE_LEVEL
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    std = s * torch.sqrt(-dt)
    if prev_sample is None:
        assert noise is not None
        prev_sample = mean + std * noise
    log_prob = (
        -((prev_sample.detach().float() - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    )
    return prev_sample, log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


def flow_grpo_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow-GRPO's clipped loss and the metrics that its trainer logs."""
    advantages = torch.clamp(advantages, -ADVANTAGE_CLIP, ADVANTAGE_CLIP)
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - CLIP_RANGE, 1.0 + CLIP_RANGE)
    loss = torch.mean(torch.maximum(unclipped, clipped))
    with torch.no_grad():
        metrics = {
            "approx_kl": 0.5 * torch.mean((log_prob - old_log_prob) ** 2),
            "clip_fraction": torch.mean((torch.abs(ratio - 1.0) > CLIP_RANGE).float()),
            "policy_loss": loss.detach(),
        }
    return loss, metrics


def _objective(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    _, log_prob = flow_grpo_step(model_output, sample, sigma, sigma_next, sigma_max, prev_sample=prev_sample)
    return flow_grpo_loss(log_prob, old_log_prob, advantages)


def flow_grpo(x: Inputs, old_log_prob: Tensor, objective: Any = _objective) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, metrics = objective(
        x.model_output, x.sample, x.prev_sample, old_log_prob, x.advantages, x.sigma, x.sigma_next, x.sigma_max
    )
    return loss, torch.autograd.grad(loss, x.model_output)[0], metrics


def variants(x: Inputs, compiled: bool = True) -> list[Variant]:
    """Our loss and Flow-GRPO's arithmetic, which is also compiled."""
    old = x.old_log_prob_mean
    found = [
        Variant("ours", "ours, no weights", lambda: ours(x, None)),
        Variant("ours_weighted", "ours, weights on the patch grid", lambda: ours(x, x.weights)),
        Variant("eager", "Flow-GRPO arithmetic, eager", lambda: flow_grpo(x, old)),
        Variant("ours_directly", "ours, no weights, PolicyLoss.backward", ours_directly(x)),
    ]
    if compiled:
        objective = torch.compile(_objective, fullgraph=True, dynamic=False)
        found.append(Variant("compiled", "Flow-GRPO arithmetic, torch.compile", lambda: flow_grpo(x, old, objective)))
    return found
