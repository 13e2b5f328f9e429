"""The policy loss for trainers that store means of transitions instead of velocities.

In a transition with a = 0 and b = 1 the model output is the mean, so the kernels of
:func:`star_kernels.weighted_policy_loss` apply unchanged, forward and backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from star_kernels.integrations.layout import channel_dim_of, check_shape, column, weights_like
from star_kernels.policy import PolicyLoss, Transition, weighted_policy_loss

SAMPLERS = ("sde", "cps", "dance_sde")


def mean_transition(std_dev_t: Tensor, sqrt_dt: Tensor, *, sde_type: str = "sde") -> Transition:
    """The transition whose model output is its mean: ``prev ~ N(0 x + 1 v, std^2)``.

    Args:
        std_dev_t: the noise scale of the sampler, ``[B, 1, ...]``, ``[B]`` or a single element.
        sqrt_dt: ``sqrt(-dt)``, with the same shapes.
        sde_type: "sde" (Flow-GRPO): a Gaussian with standard deviation ``std_dev_t sqrt(-dt)``. "cps": one with
            standard deviation ``std_dev_t`` and the log-probability ``-(prev - mean)^2`` (arXiv 2509.05952).
            "dance_sde": a Gaussian with standard deviation ``std_dev_t``, which includes ``sqrt(-dt)``, as in
            VeRL-Omni. The scale of the KL penalty is ``1 / (2 std_dev_t^2)`` for all of them.
    """
    if sde_type not in SAMPLERS:
        raise ValueError(f"sde_type must be one of {', '.join(map(repr, SAMPLERS))}, got {sde_type!r}")
    s, root = torch.broadcast_tensors(std_dev_t.detach().double().reshape(-1), sqrt_dt.detach().double().reshape(-1))
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    kl_scale = 0.5 / s.square()
    if sde_type == "cps":
        rows = (zero, one, s, one, zero, kl_scale)
    else:
        std = s if sde_type == "dance_sde" else s * root
        rows = (zero, one, std, 0.5 / std.square(), -torch.log(std) - 0.5 * math.log(2 * math.pi), kl_scale)
    return Transition(torch.stack(rows).float())


def log_prob_of_means(
    prev_sample_mean: Tensor, prev_sample: Tensor, transition: Transition, *, channel_dim: int | None = None
) -> Tensor:
    """The log-probability of each location, ``[B, *locations]``: the mean over channels. Differentiable in the mean.

    Args:
        prev_sample_mean, prev_sample: the mean of the transition and the sampled latent, in a layout of
            :func:`policy_loss_of_means`.
        transition: from :func:`mean_transition`.
        channel_dim: the channel dimension, if it differs from that of the layouts.
    """
    squares = (prev_sample.detach().float() - prev_sample_mean.float()).square()
    density = column(transition.offset, squares) - column(transition.scale, squares) * squares
    return density.mean(dim=channel_dim_of(prev_sample_mean, channel_dim))


def policy_loss_of_means(
    prev_sample_mean: Tensor,
    prev_sample: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
    advantages: Tensor,
    *,
    old_log_prob: Tensor | None = None,
    old_prev_sample_mean: Tensor | None = None,
    weights: Tensor | None = None,
    guard: bool = False,
    kl_mask_threshold: float | None = None,
    sde_type: str = "sde",
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip_max: float = 5.0,
    beta: float = 0.0,
    ref_prev_sample_mean: Tensor | None = None,
    step_weights: Tensor | None = None,
    ratio: str = "sample",
    weighted_kl: bool = False,
    mask: Tensor | None = None,
    reduction: str = "mean",
    channel_dim: int | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """Flow-GRPO's clipped loss from the mean of the transition, with weights for the latent positions.

    For trainers that store means, such as ``prev_sample_mean`` in VeRL-Omni and ``next_latents_mean`` in Flow-Factory.

    Args:
        prev_sample_mean: mean of the transition under the trained model, ``[B, C, H, W]``, ``[B, C, F, H, W]`` or
            packed ``[B, S, C]``. Only this argument receives a gradient.
        prev_sample: the latent sampled in the rollout, of the same shape.
        std_dev_t, sqrt_dt, sde_type: see :func:`mean_transition`.
        advantages: ``[B]``, clamped to ``+-adv_clip_max``.
        old_log_prob: log-probability in the rollout, ``[B]`` (only without weights) or ``[B, *locations]``. If None, it
            is computed from ``old_prev_sample_mean``.
        old_prev_sample_mean: mean of the transition under the model of the rollout.
        weights: ``[B, *locations]`` with mean one, or a grid ``[B, h, w]`` of patches or of the positions of a packed
            latent.
        guard: if True, use GRPO-Guard's normalised ratio and divide the loss of each sample by -dt; requires
            ``old_prev_sample_mean``.
        kl_mask_threshold: Flow-DPPO's threshold of the divergence from ``old_prev_sample_mean``, in place of
            ``clip_range``; see :func:`star_kernels.weighted_policy_loss`.
        beta, ref_prev_sample_mean: coefficient of the KL penalty, and the mean under the reference model.
        step_weights: ``[B]``, a factor for the policy loss of each sample.
        clip_range, ratio, weighted_kl, mask, reduction, backend: see :func:`star_kernels.weighted_policy_loss`.
        channel_dim: the channel dimension, if it differs from that of the layouts.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or range; the message names the argument.
    """
    masks = kl_mask_threshold is not None
    if guard and masks:
        raise ValueError("guard must be False with kl_mask_threshold, whose ratio is not normalised, got True")
    if old_prev_sample_mean is None and (guard or masks or old_log_prob is None):
        use = "with guard=True" if guard else "with kl_mask_threshold" if masks else "if old_log_prob is None"
        raise ValueError(f"old_prev_sample_mean must be given {use}, got None")
    for name, latent in (("prev_sample", prev_sample), ("old_prev_sample_mean", old_prev_sample_mean)):
        if latent is not None:
            check_shape(name, latent, "prev_sample_mean", prev_sample_mean)
    channel_dim = channel_dim_of(prev_sample_mean, channel_dim)
    transition = mean_transition(std_dev_t, sqrt_dt, sde_type=sde_type)
    prev_sample = prev_sample.detach()
    if old_log_prob is None:
        assert old_prev_sample_mean is not None
        old_log_prob = log_prob_of_means(
            old_prev_sample_mean.detach(), prev_sample, transition, channel_dim=channel_dim
        )
    if guard:
        balance = sqrt_dt.detach().float().reshape(-1).square().reciprocal().expand(len(prev_sample))
        step_weights = balance if step_weights is None else balance * step_weights
    return weighted_policy_loss(
        prev_sample_mean,
        prev_sample,
        prev_sample,
        old_log_prob.float(),
        advantages.float(),
        transition,
        weights=weights_like(weights, prev_sample),
        clip_range=clip_range,
        advantage_clip=adv_clip_max,
        ref_model_output=ref_prev_sample_mean if beta else None,
        kl_coef=beta,
        old_model_output=old_prev_sample_mean if guard or masks else None,
        kl_mask_threshold=kl_mask_threshold,
        step_weights=step_weights,
        ratio=ratio,
        weighted_kl=weighted_kl,
        mask=mask,
        reduction=reduction,
        channel_dim=channel_dim,
        backend=backend,
    )


def ratio_of_means(
    prev_sample_mean: Tensor,
    prev_sample: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
    *,
    old_log_prob: Tensor | None = None,
    old_prev_sample_mean: Tensor | None = None,
    weights: Tensor | None = None,
    guard: bool = False,
    sde_type: str = "sde",
    mask: Tensor | None = None,
    channel_dim: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The differentiable ratio of each sample, ``[B]``, for trainers that clip it themselves.

    With weights it is ``exp(mean_p W_p d_p)``, where d is the channel-mean log-ratio at a position. It is computed as
    the unclipped loss with advantages of -1. Arguments are those of :func:`policy_loss_of_means`. With ``guard`` it is
    the normalised ratio, not divided by -dt.
    """
    undo = sqrt_dt.detach().float().reshape(-1).square().expand(len(prev_sample)) if guard else None
    return policy_loss_of_means(
        prev_sample_mean,
        prev_sample,
        std_dev_t,
        sqrt_dt,
        -torch.ones(len(prev_sample), device=prev_sample.device),
        old_log_prob=old_log_prob,
        old_prev_sample_mean=old_prev_sample_mean,
        weights=weights,
        guard=guard,
        sde_type=sde_type,
        clip_range=(1.0, math.inf),
        step_weights=undo,  # cancels guard's division by -dt
        mask=mask,
        reduction="none",
        channel_dim=channel_dim,
        backend=backend,
    ).loss
