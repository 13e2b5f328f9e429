"""The clipped policy loss with a weight for each latent position, and the sampling step that feeds it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.policy import naive, ops
from star_kernels.policy.checks import (
    check_clip,
    check_latent,
    check_objective,
    check_transition,
    check_weight_values,
    resolve_channel_dim,
)
from star_kernels.policy.transitions import Transition, dance_sde, flow_cps, flow_matching, flow_sde

__all__ = [
    "PolicyLoss",
    "Transition",
    "dance_sde",
    "flow_cps",
    "flow_matching",
    "flow_sde",
    "sample_transition",
    "weighted_policy_loss",
]

BACKENDS = ("auto", "naive", "native")


class PolicyLoss(NamedTuple):
    """The loss, and detached 0-dimensional metrics that cost no wait for a device until they are read.

    Metrics: ``ratio_mean``, ``ratio_max``, ``clip_fraction`` (ratios outside the clip range), ``approx_kl``
    (half the mean squared log-ratio), ``policy_loss``, ``kl_loss`` (before ``kl_coef``).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def sample_transition(
    model_output: Tensor,
    sample: Tensor,
    transition: Transition,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    channel_dim: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One denoising step: draws ``prev ~ N(a x + b v, std^2)`` and gives its log-probability at every location.

    The log-probability is that of the value returned, after rounding to the sample's dtype, so that the policy ratio
    of an unchanged model is exactly one. Not differentiable.

    Args:
        model_output: velocity ``[B, C, H, W]``, ``[B, C, F, H, W]`` or packed ``[B, S, C]`` with ``channel_dim=-1``.
        sample: the current latent, of that shape; both float32, float16 or bfloat16 (float32 latents are advised).
        transition: the sampler's coefficients, see :func:`flow_sde`.
        noise: standard normal, of that shape; drawn in float32 with ``generator`` if not given.
        channel_dim: the dimension that log-probabilities are averaged over.
        backend: "auto", "native" (compiled kernels) or "naive" (plain PyTorch).

    Returns:
        ``(prev_sample, log_prob)``: like sample, and float32 ``[B, *locations]``.
    """
    channel_dim = resolve_channel_dim(channel_dim, model_output)
    check_latent("sample", sample, model_output)
    check_transition(transition, model_output)
    if noise is None:
        wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
        noise = torch.randn(sample.shape, generator=generator, dtype=wide, device=sample.device)
    elif generator is not None:
        raise ValueError("generator must be None where noise is given, got both")
    else:
        check_latent("noise", noise, model_output)
    arguments = (model_output.detach(), sample.detach(), noise.detach(), transition.coefficients, channel_dim)
    if _resolve_backend(backend, model_output) == "naive":
        return naive.sample_transition(*arguments)
    prev_sample, log_prob = ops.SAMPLE_TRANSITION(*arguments)
    return prev_sample, log_prob


def weighted_policy_loss(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    transition: Transition,
    *,
    weights: Tensor | None = None,
    ratio: str = "sample",
    clip_range: float | tuple[float, float] = 1e-4,
    advantage_clip: float = 5.0,
    ref_model_output: Tensor | None = None,
    kl_coef: float = 0.0,
    channel_dim: int = 1,
    backend: str = "auto",
) -> PolicyLoss:
    """Flow-GRPO's clipped policy loss, with the advantage allocated over latent positions by ``weights``.

    With d_p the channel-mean log-ratio at position p and W the weights (mean one, from :func:`star_kernels.allocate`):

    * ``ratio="sample"``: ``rho = exp(mean_p W_p d_p)``, one clip per sample. Without weights this is Flow-GRPO.
    * ``ratio="location"``: ``rho_p = exp(d_p)``, ``loss = mean_p W_p max(-A rho_p, -A clip(rho_p))``. A position's
      log-ratio is about sqrt(P) wider than a sample's, so the clip range must be.

    The gradient goes to ``model_output`` alone.

    Args:
        model_output: velocity of the model in training, ``[B, C, H, W]``, ``[B, C, F, H, W]`` or packed ``[B, S, C]``
            with ``channel_dim=-1``; float32, float16 or bfloat16. Arithmetic is float32; float64 runs the definition.
        sample, prev_sample: the latents before and after the step, of that shape.
        old_log_prob: float32 ``[B, *locations]`` from :func:`sample_transition`; without weights and with
            ``ratio="sample"`` also ``[B]``, its mean over locations.
        advantages: float32 ``[B]``, clamped to ``+-advantage_clip``.
        transition: the sampler's coefficients, see :func:`flow_sde`.
        weights: float32 ``[B, *locations]``, or on a coarser (patch) grid that divides the latent's; not negative.
        clip_range: half-width of the ratio's trust region, or (below, above) one.
        ref_model_output: velocity of the reference model; adds ``kl_coef * mean(kl_scale (mean - mean_ref)^2)``.
        channel_dim: the dimension that log-probabilities are averaged over.
        backend: "auto", "native" (compiled kernels) or "naive" (plain PyTorch).

    Returns:
        ``(loss, metrics)``: the 0-dimensional float32 loss, and a dictionary of detached 0-dimensional tensors.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or range; the message names it. Values
            of weights on a GPU are not looked at.
    """
    channel_dim = resolve_channel_dim(channel_dim, model_output)
    check_latent("sample", sample, model_output)
    check_latent("prev_sample", prev_sample, model_output)
    check_transition(transition, model_output)
    check_objective(model_output, channel_dim, old_log_prob, advantages, weights, ratio)
    clip_low, clip_high = check_clip(clip_range, advantage_clip, kl_coef)
    if ref_model_output is not None:
        check_latent("ref_model_output", ref_model_output, model_output)
    elif kl_coef:
        raise ValueError(f"ref_model_output must be given where kl_coef is not 0, got None and kl_coef {kl_coef}")
    arguments = (
        model_output,
        _constant(sample),
        _constant(prev_sample),
        _constant(old_log_prob),
        _constant(advantages),
        transition.coefficients,
        None if weights is None else _constant(weights),
        None if ref_model_output is None else _constant(ref_model_output),
        channel_dim,
        ratio == "location",
        clip_low,
        clip_high,
        advantage_clip,
        kl_coef,
    )
    if _resolve_backend(backend, model_output) == "naive":
        if weights is not None:
            check_weight_values(weights)
        loss, metrics = naive.weighted_policy_loss(*arguments)
    else:
        loss, metrics, _ = ops.WEIGHTED_POLICY_LOSS(*arguments)
    return PolicyLoss(loss, dict(zip(naive.METRICS, metrics.unbind(), strict=True)))


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def choose_backend(model_output: Tensor) -> str:
    """What "auto" means for these inputs."""
    return "naive" if _obstacle(model_output) else "native"


def _resolve_backend(backend: str, model_output: Tensor) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return choose_backend(model_output)
    if backend == "native" and (obstacle := _obstacle(model_output)):
        raise ValueError(
            f"backend 'native' cannot run here: {obstacle}; got {model_output.dtype} on {model_output.device}"
        )
    return backend


def _obstacle(model_output: Tensor) -> str:
    """What keeps the compiled kernels from these inputs, if anything."""
    if model_output.dtype == torch.float64:
        return "they have no float64"
    return native.problem(model_output.device.type)
