"""Flow-GRPO's step and policy loss with the fused kernels; import them from ``star_kernels.integrations.flow_grpo``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from star_kernels.integrations.layout import channel_dim_of, check_shape, column, weights_like
from star_kernels.integrations.schedule import step_at
from star_kernels.policy import PolicyLoss, Transition, sample_transition, weighted_policy_loss

Generators = torch.Generator | list[torch.Generator] | None


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor | float,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
    *,
    dense_log_prob: bool = False,
    channel_dim: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Samples the next latent, or uses a given one, and computes its log-probability, as Flow-GRPO's function does.

    Sampling is one fused kernel. With a given ``prev_sample`` the results are differentiable with respect to
    ``model_output``; for a loss, :func:`policy_loss` is cheaper because it does not store means and log-probabilities.

    Args:
        self: the scheduler, see :func:`star_kernels.integrations.schedule.step_at`; it is not modified.
        model_output, sample: velocity and latent, ``[B, C, H, W]``, ``[B, C, F, H, W]`` or packed ``[B, S, C]``.
            Arithmetic and results are float32.
        timestep: an element of ``self.timesteps``, or a tensor ``[B]`` or ``[1]`` of them. Other values give NaN.
        noise_level: noise level of the sampler; 0 is the deterministic step.
        prev_sample: the next latent. If None, it is sampled with ``generator``, from the same random numbers as in
            Flow-GRPO.
        sde_type: "sde" or "cps" (Flow-CPS).
        return_sqrt_dt: whether to return ``sqrt(-dt)`` as well.
        dense_log_prob: if True, return the log-probability of every location, which a loss with weights requires,
            instead of their mean.
        channel_dim: the channel dimension, if it differs from that of the layouts above.
        backend: see :func:`star_kernels.sample_transition`.

    Returns:
        ``(prev_sample, log_prob, prev_sample_mean, std_dev_t)`` and, if requested, ``sqrt(-dt)``. log_prob is ``[B]``,
        or ``[B, *locations]`` if dense. std_dev_t and sqrt(-dt) are ``[B, 1, ...]``, or ``[1, 1, ...]`` for a single
        timestep.

    Raises:
        TypeError, ValueError: wrong type, shape or range; the message names the argument.
    """
    channel_dim = channel_dim_of(model_output, channel_dim)
    for name, latent in (("sample", sample), ("prev_sample", prev_sample)):
        if latent is not None:
            check_shape(name, latent, "model_output", model_output)
    step = step_at(self, timestep, sample, noise_level=noise_level, sde_type=sde_type)
    transition = step.transition
    model_output, sample = model_output.float(), sample.float()
    prev_sample_mean = mean_of(model_output, sample, transition)
    log_prob: Tensor | None = None
    if prev_sample is None:
        noise = _noise(model_output, generator)
        prev_sample, log_prob = sample_transition(
            model_output, sample, transition, noise=noise, channel_dim=channel_dim, backend=backend
        )
    else:
        prev_sample = prev_sample.float()
    if log_prob is None or prev_sample_mean.requires_grad:
        log_prob = log_prob_of(prev_sample_mean, prev_sample, transition, channel_dim)
    if not dense_log_prob:
        log_prob = log_prob.flatten(1).mean(dim=1)
    results = (prev_sample, log_prob, prev_sample_mean, column(step.std_dev_t, sample))
    return (*results, column(step.sqrt_dt, sample)) if return_sqrt_dt else results


# For scripts, which import it under the name sde_step_with_logprob.
dense_sde_step_with_logprob = partial(sde_step_with_logprob, dense_log_prob=True)


def policy_loss(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor | float,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    noise_level: float = 0.7,
    sde_type: str = "sde",
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip_max: float = 5.0,
    beta: float = 0.0,
    ref_model_output: Tensor | None = None,
    old_model_output: Tensor | None = None,
    old_prev_sample_mean: Tensor | None = None,
    weights: Tensor | None = None,
    ratio: str = "sample",
    weighted_kl: bool = False,
    step_weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    channel_dim: int | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Flow-GRPO's clipped loss with its KL penalty, computed from the velocity in one fused kernel per direction.

    Without weights this is the loss of Flow-GRPO's scripts, with weights that of
    :func:`star_kernels.weighted_policy_loss`. With ``old_model_output`` or ``old_prev_sample_mean`` it is the loss of
    GRPO-Guard (arXiv 2510.22319): the ratio is normalised, and the loss of each sample is divided by -dt.

    Args:
        scheduler, timestep, noise_level, sde_type: see :func:`sde_step_with_logprob`.
        model_output: velocity of the trained model (after guidance), in a layout of :func:`sde_step_with_logprob` and
            any floating-point dtype. Only this argument receives a gradient.
        sample, prev_sample: latents before and after the step, of the same shape.
        old_log_prob: log-probability in the rollout, ``[B]``, or with weights ``[B, *locations]`` (``dense_log_prob``).
        advantages: ``[B]``, clamped to ``+-adv_clip_max``.
        clip_range: half-width of the clip range of the ratio, or (below, above) 1.
        beta: coefficient of the KL penalty ``mean((mean - mean_ref)^2 / (2 std_dev_t^2))``.
        ref_model_output: velocity of the reference model; used if beta is not 0.
        old_model_output, old_prev_sample_mean: velocity of the model in the rollout, or the mean of its transition; at
            most one of them.
        weights: ``[B, *locations]`` with mean one, or a grid ``[B, h, w]`` of patches or of the positions of a packed
            latent.
        ratio, weighted_kl, step_weights, mask, reduction, backend: see :func:`star_kernels.weighted_policy_loss`.
        channel_dim: the channel dimension, if it differs from that of the layouts.

    Returns:
        ``(loss, metrics)``: the float32 loss, and detached 0-dimensional tensors named as in the scripts:
        ``policy_loss``, ``kl_loss`` (with beta), ``loss``, ``approx_kl``, ``clipfrac``, and also ``ratio_mean`` and
        ``ratio_max``. For GRPO-Guard ``approx_kl`` is that of the normalised ratio.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or range; the message names the argument.
    """
    if beta and ref_model_output is None:
        raise ValueError(f"ref_model_output must be given if beta is not 0, got None with beta={beta}")
    if old_model_output is not None and old_prev_sample_mean is not None:
        raise ValueError("old_prev_sample_mean must be None if old_model_output is given, got both")
    channel_dim = channel_dim_of(model_output, channel_dim)
    step = step_at(scheduler, timestep, sample, noise_level=noise_level, sde_type=sde_type)
    if old_prev_sample_mean is not None:
        check_shape("old_prev_sample_mean", old_prev_sample_mean, "model_output", model_output)
        check_shape("sample", sample, "model_output", model_output)
        mean_sample, mean_output = (column(row, sample) for row in step.transition.coefficients[:2])
        old_model_output = (old_prev_sample_mean.float() - mean_sample * sample.float()) / mean_output
    if old_model_output is not None:
        balance = step.sqrt_dt.square().reciprocal().expand(len(sample))
        step_weights = balance if step_weights is None else balance * step_weights
    loss, found = weighted_policy_loss(
        model_output,
        sample,
        prev_sample,
        old_log_prob.float(),
        advantages.float(),
        step.transition,
        weights=weights_like(weights, model_output),
        clip_range=clip_range,
        advantage_clip=adv_clip_max,
        ref_model_output=ref_model_output if beta else None,
        kl_coef=beta,
        old_model_output=old_model_output,
        ratio=ratio,
        weighted_kl=weighted_kl,
        step_weights=step_weights,
        mask=mask,
        reduction=reduction,
        channel_dim=channel_dim,
        backend=backend,
    )
    metrics = {name: found[name] for name in ("policy_loss", "approx_kl", "ratio_mean", "ratio_max")}
    metrics |= {"clipfrac": found["clip_fraction"], "loss": loss.detach()}
    return PolicyLoss(loss, metrics | {"kl_loss": found["kl_loss"]} if beta else metrics)


def mean_of(model_output: Tensor, sample: Tensor, transition: Transition) -> Tensor:
    """The mean of the transition, of the shape of ``sample``; float32 arguments."""
    mean_sample, mean_output = column(transition.mean_sample, sample), column(transition.mean_output, sample)
    return torch.addcmul(mean_sample * sample, mean_output, model_output)


def log_prob_of(mean: Tensor, prev_sample: Tensor, transition: Transition, channel_dim: int) -> Tensor:
    """The log-probability of each location, ``[B, *locations]``; float32 arguments."""
    squares = (prev_sample.detach() - mean).square()
    density = column(transition.offset, mean) - column(transition.scale, mean) * squares
    return density.mean(dim=channel_dim)


def _noise(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise in float32, equal to that of diffusers' ``randn_tensor`` with the same generators."""
    generators = generator if isinstance(generator, list) else [generator]
    if len(generators) not in (1, len(like)):
        raise ValueError(
            f"generator must be one generator or a list of {len(like)}, one for each sample, got {len(generators)}"
        )
    shape = like.shape if len(generators) == 1 else (1, *like.shape[1:])
    drawn = [
        torch.randn(shape, generator=g, device=like.device if g is None else g.device, dtype=torch.float32)
        for g in generators
    ]
    return (drawn[0] if len(drawn) == 1 else torch.cat(drawn)).to(like.device)
