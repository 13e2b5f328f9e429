"""The policy losses: clipped ratios of transitions, and DiffusionNFT's loss of the forward process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from star_kernels.checks import check_flag, check_number
from star_kernels.policy import direct, naive, ops
from star_kernels.policy.arguments import NftArguments, PolicyArguments
from star_kernels.policy.backends import resolve_backend
from star_kernels.policy.checks import (
    CLIP_RANGE,
    check_beta,
    check_clip,
    check_coefficients,
    check_kl_mask,
    check_mask,
    check_ratio,
    check_reduction,
    check_ref_model_output,
    check_tensors,
    check_transition,
    check_weight_values,
    resolve_channel_dim,
)
from star_kernels.policy.transitions import Transition
from star_kernels.torch_internals import register_pytree


@dataclass(eq=False)
class PolicyLoss:
    """A loss, and detached 0-dimensional metrics; reading a metric of a GPU synchronises, computing it does not.

    ``loss, metrics = result`` unpacks it.

    Attributes:
        loss: float32 ``[]``, or ``[B]`` with ``reduction="none"``. It becomes part of the autograd graph when it is
            first read; after :meth:`backward` it is a value without a graph, unless it was read before.
        metrics: 0-dimensional tensors by name.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    _done: ClassVar[direct.Pass | None] = None

    def backward(self, scale: float | Tensor = 1.0) -> None:
        """Backpropagates ``loss * scale`` through the model, like ``(loss * scale).backward()`` and with less work.

        With a scale of one the gradient of the model's output, which the forward pass has computed, enters the model
        directly: no kernel of the loss runs, and hooks of ``loss`` are not called.

        Args:
            scale: a number or a tensor of one element: for example one over the number of accumulated batches, or a
                gradient scaler's ``scaler.scale(torch.ones(()))``, on the device of the loss.

        Raises:
            RuntimeError: the loss does not require grad, is a loss for each sample (``reduction="none"``), or its graph
                has been freed by an earlier backward pass.
        """
        done, loss = self._done, self.__dict__.get("loss")  # None if it has not been read
        if done is not None and done.error is not None:
            raise RuntimeError(done.error)
        if done is None or loss is not None:
            value, differentiable = self.loss, self.loss.requires_grad
        else:
            value, differentiable = done.value, done.differentiable
        if not differentiable:
            raise RuntimeError(
                "PolicyLoss.backward: the loss does not require grad; model_output must require grad, and grad mode be "
                "enabled, when the loss is computed"
            )
        if value.ndim > 0:
            raise RuntimeError(
                f"PolicyLoss.backward: the loss must be one number, got one of shape {list(value.shape)}; with "
                "reduction='none' call backward() of a sum of loss"
            )
        if not isinstance(scale, Tensor):
            check_number("scale", scale)
        elif scale.numel() != 1:
            raise ValueError(f"scale must be a number or a tensor of one element, got {list(scale.shape)}")
        learned = isinstance(scale, Tensor) and scale.requires_grad
        if done is None or learned or torch.is_anomaly_enabled() or not done.backward(loss, scale):
            (self.loss * scale).backward()

    def __iter__(self) -> Iterator[Any]:
        yield self.loss
        yield self.metrics

    def __getitem__(self, index: int) -> Any:
        return (self.loss, self.metrics)[index]

    def __len__(self) -> int:
        return 2

    def __getattr__(self, name: str) -> Any:
        """The loss or the metrics of an ordinary call when they are first read."""
        done = self._done
        if done is None or name not in ("loss", "metrics"):
            raise AttributeError(f"PolicyLoss has no attribute {name!r}")
        found = done.attach() if name == "loss" else _named(done.objective.metrics, done.metrics, done.absent_metrics)
        setattr(self, name, found)
        return found

    def __reduce__(self) -> Any:
        return PolicyLoss, (self.loss, self.metrics)


register_pytree(PolicyLoss, tuple)


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
    clip_range: float | tuple[float, float] = CLIP_RANGE,
    advantage_clip: float = 5.0,
    ref_model_output: Tensor | None = None,
    kl_coef: float = 0.0,
    weighted_kl: bool = False,
    old_model_output: Tensor | None = None,
    kl_mask_threshold: float | None = None,
    step_weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    channel_dim: int = 1,
    backend: str = "auto",
) -> PolicyLoss:
    """Flow-GRPO's clipped policy loss, with the advantage allocated over latent positions by ``weights``.

    Let d_p be the channel-mean log-ratio at position p and W the weights (mean one, from
    :func:`star_kernels.allocate`):

    * ``ratio="sample"``: ``rho = exp(mean_p W_p d_p)``, one clip per sample. Without weights this is Flow-GRPO
      (arXiv 2505.05470). With the transition :func:`flow_matching` it is advantage-weighted flow matching.
    * ``ratio="location"``: ``rho_p = exp(d_p)``, ``loss = mean_p W_p max(-A rho_p, -A clip(rho_p))``. The log-ratio of
      a position is about sqrt(P) wider than that of a sample, so it needs a wider clip range.

    Advantages of phrases, ``[B, G]`` with weights ``[B, G, *locations]`` (not in the STAR paper; see docs/method.md),
    give the sum of the G losses and one KL penalty:

    * ``ratio="sample"``: ``rho_g = exp(mean_p W_gp d_p)``, ``loss = sum_g max(-A_g rho_g, -A_g clip(rho_g))``.
    * ``ratio="location"``: ``loss = mean_p sum_g W_gp max(-A_g rho_p, -A_g clip(rho_p))``.

    Dense advantages ``[B, *locations]`` have a sign and a size at each location:

    * ``ratio="sample"``: ``loss = mean_p W_p max(-A_p s_p, -A_p clip(s_p))`` with the ratio of GSPO-token
      (arXiv 2507.18071): ``s_p`` has the value of ``rho``, the same at all locations, and the gradient
      ``rho grad d_p``. A constant A_p gives the loss of advantages ``[B]``, if the weights have mean one.
    * ``ratio="location"``: ``loss = mean_p W_p max(-A_p rho_p, -A_p clip(rho_p))``.

    With ``kl_mask_threshold`` the mask of Flow-DPPO (arXiv 2606.11025) takes the place of the clip: the loss of a ratio
    is ``-A rho``, and 0 without a gradient if the divergence D from the rollout's policy is at least the threshold and
    the gradient leads further away (A > 0 and rho > 1, or A < 0 and rho < 1). ``D_p = mean_c (mean - mean_old)^2 /
    (2 std^2)``. A ratio of a sample has the mean of D_p over the locations that count, whatever the weights, as
    published; a ratio of a location has D_p (not in the paper).

    Only ``model_output`` receives a gradient. The kernels support the first derivative in reverse mode;
    ``backend="naive"`` supports all derivatives. If ``model_output`` requires grad, the compiled kernels compute its
    gradient in the forward pass and keep it, in memory of its size, until the backward pass; they need no other memory
    of that size. :meth:`PolicyLoss.backward` is the fastest backward pass.

    Args:
        model_output: velocity of the model in training, ``[B, C, H, W]``, ``[B, C, F, H, W]`` or packed ``[B, S, C]``
            with ``channel_dim=-1``; float32, float16 or bfloat16. Arithmetic is float32; float64 runs the reference
            implementation.
        sample, prev_sample: the latents before and after the step, of that shape. If they are swapped, ``ratio_mean``
            of the first update is far from one.
        old_log_prob: float32 ``[B, *locations]`` from :func:`sample_transition`; without weights and with
            ``ratio="sample"`` also ``[B]``, its mean over locations.
        advantages: float32 ``[B]``; dense ``[B, *locations]``; or ``[B, G]`` with the weights of G phrases (divide them
            by G for a mean over phrases; an advantage of zero removes a phrase). Clamped to ``+-advantage_clip``. All
            forms read the latents once in each pass.
        transition: the sampler's coefficients, see :func:`flow_sde`.
        weights: float32 ``[B, *locations]``, or ``[B, *grid]`` on a coarser (patch) grid that divides the latent's; not
            negative. Weights of phrases, ``[B, G, *locations]`` or ``[B, G, *grid]``, have one dimension more: this
            decides whether advantages are ``[B, G]``, even if G is the number of locations. Their mean is not checked:
            ``allocate(over="trajectory")`` gives steps different means. A mean of m acts on the first update like an
            advantage that is m times as large.
        ratio: "sample", one ratio and clip per sample; or "location", one per position.
        clip_range: c clips the ratio to ``[1 - c, 1 + c]``, a pair (a, b) to ``[1 - a, 1 + b]``.
        advantage_clip: advantages are clamped to plus and minus this value.
        ref_model_output: velocity of the reference model; adds ``kl_coef * mean(kl_scale (mean - mean_ref)^2)``.
        kl_coef: factor of the KL penalty; 0 without ``ref_model_output``.
        weighted_kl: whether the weights also apply to that penalty; must be False with the weights of phrases.
        old_model_output: velocity of the rollout's model; enables GRPO-Guard's normalisation of the ratio
            (arXiv 2510.22319): ``d_p <- (d_p + scale (mean - mean_old)^2) / (2 scale std)``, so that the log-ratio
            has mean zero and the same width at every step. The paper's balance of the steps is
            ``step_weights = 1 / (sigma - sigma_next)``. With ``kl_mask_threshold`` the ratio is not normalised.
        kl_mask_threshold: Flow-DPPO's threshold of the divergence from ``old_model_output``, which it requires, in
            place of ``clip_range``, which must then have its default; positive. The published recipes use 1e-5.
        step_weights: float32 ``[B]``, a factor of each sample's policy loss (not of its KL penalty).
        mask: bool ``[B, *locations]``, true for locations that count, for example to exclude the padding of packed
            latents. All means are over those locations, and weights should have mean one over them.
        reduction: "mean" over the batch, or "none": the loss is ``[B]``.
        channel_dim: the dimension that log-probabilities are averaged over.
        backend: "auto", "native" (compiled kernels), "triton" (on CUDA) or "naive" (plain PyTorch).

    Returns:
        ``(loss, metrics)``: the float32 loss, and ``ratio_mean``, ``ratio_max``, ``clip_fraction`` (ratios outside the
        clip range, or whose divergence is at least ``kl_mask_threshold``), ``approx_kl`` (half the mean squared
        log-ratio), with ``kl_mask_threshold`` ``kl_new_old_mean`` (the mean divergence), ``policy_loss`` and
        ``kl_loss`` (before ``kl_coef``), over the batch. With phrases ``policy_loss`` is the sum over them,
        ``ratio_max`` the maximum, and the other metrics of ratios are means over phrases.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range; the message names it.
            Values of tensors on a GPU are not checked: a sample with an empty mask, an error on a CPU, contributes
            nothing there.
    """
    per_location = check_ratio(ratio)
    clip_low, clip_high = check_clip(clip_range)
    threshold = 0.0
    if kl_mask_threshold is not None:
        threshold = check_kl_mask(kl_mask_threshold, clip_range, old_model_output)
        clip_low, clip_high = 0.0, math.inf
    check_flag("weighted_kl", weighted_kl)
    unreduced = _check_common(reduction, advantage_clip, kl_coef, ref_model_output)
    channel_dim = resolve_channel_dim(channel_dim, model_output)
    check_transition(transition)
    arguments = PolicyArguments(
        model_output=model_output,
        sample=sample,
        prev_sample=prev_sample,
        old_log_prob=old_log_prob,
        advantages=advantages,
        coefficients=transition.coefficients,
        weights=weights,
        mask=mask,
        step_weights=step_weights,
        old_model_output=old_model_output,
        ref_model_output=ref_model_output,
        channel_dim=channel_dim,
        per_location=per_location,
        weighted_kl=weighted_kl,
        unreduced=unreduced,
        clip_low=clip_low,
        clip_high=clip_high,
        advantage_clip=advantage_clip,
        kl_coef=kl_coef,
        kl_mask_threshold=threshold,
    )
    return _computed(arguments, backend, direct.POLICY, naive.weighted_policy_loss, ops.WEIGHTED_POLICY_LOSS)


def weighted_nft_loss(
    model_output: Tensor,
    old_model_output: Tensor,
    target: Tensor,
    advantages: Tensor,
    sigma: Tensor,
    *,
    weights: Tensor | None = None,
    beta: float = 1.0,
    adaptive: bool = True,
    advantage_clip: float = 5.0,
    ref_model_output: Tensor | None = None,
    kl_coef: float = 0.0,
    weighted_kl: bool = False,
    step_weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    channel_dim: int = 1,
    backend: str = "auto",
) -> PolicyLoss:
    """DiffusionNFT's loss of the forward process (arXiv 2509.16117), with weights for the latent positions.

    The implicit policies are ``v+ = v_old + beta (v - v_old)`` and ``v- = v_old - beta (v - v_old)``. With the weights
    W (mean one) and ``r = (clip(A / advantage_clip, -1, 1) + 1) / 2``:

        loss = advantage_clip / beta * mean_b [ r E(v+) + (1 - r) E(v-) ]
        E(u) = mean_p W_p mean_c (u - target)^2

    With ``adaptive``, as in the paper's experiments, E is the error of the image, ``x0 = x - sigma u``, divided by its
    own mean absolute error (over all positions, without gradient, at least 1e-5). Only ``model_output`` receives a
    gradient.

    Args:
        model_output: velocity of the model in training at a noised image, shapes as in :func:`weighted_policy_loss`.
        old_model_output: velocity of the model that generated the images, of that shape.
        target: the velocity of the noised image, ``eps - x0``, of that shape.
        advantages: float32 ``[B]``.
        sigma: float32 ``[B]``, the noise level; used only if ``adaptive`` is True.
        weights, mask, step_weights, reduction, channel_dim, backend: as in :func:`weighted_policy_loss`.
        beta: the distance of the implicit policies from the old one, positive.
        advantage_clip: the advantage at which r is 1, positive.
        ref_model_output: velocity of the reference model; adds ``kl_coef * mean((v - v_ref)^2)``.
        weighted_kl: whether the weights also apply to that penalty.

    Returns:
        ``(loss, metrics)``: the float32 loss, and ``positive_loss`` and ``negative_loss`` (the means of E),
        ``deviation`` (mean of ``(v - v_old)^2``), ``policy_loss`` and ``kl_loss`` (before ``kl_coef``).

    Raises:
        TypeError, ValueError: as :func:`weighted_policy_loss`.
    """
    check_flag("adaptive", adaptive)
    check_flag("weighted_kl", weighted_kl)
    unreduced = _check_common(reduction, advantage_clip, kl_coef, ref_model_output)
    check_beta(beta, advantage_clip)
    channel_dim = resolve_channel_dim(channel_dim, model_output)
    arguments = NftArguments(
        model_output=model_output,
        old_model_output=old_model_output,
        target=target,
        advantages=advantages,
        sigma=sigma,
        weights=weights,
        mask=mask,
        step_weights=step_weights,
        ref_model_output=ref_model_output,
        channel_dim=channel_dim,
        adaptive=adaptive,
        weighted_kl=weighted_kl,
        unreduced=unreduced,
        beta=beta,
        advantage_clip=advantage_clip,
        kl_coef=kl_coef,
    )
    return _computed(arguments, backend, direct.NFT, naive.weighted_nft_loss, ops.WEIGHTED_NFT_LOSS)


def _check_common(reduction: str, advantage_clip: float, kl_coef: float, ref_model_output: Tensor | None) -> bool:
    """Checks what the objectives share; returns whether the loss is unreduced."""
    check_coefficients(advantage_clip, kl_coef)
    check_ref_model_output(ref_model_output, kl_coef)
    return check_reduction(reduction)


def _computed(
    arguments: PolicyArguments | NftArguments,
    backend: str,
    objective: direct.Objective,
    reference: Callable[..., tuple[Tensor, Tensor]],
    operator: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> PolicyLoss:
    """The loss and its metrics by name: of an ordinary call, of the reference implementation or of the operator."""
    if arguments.mask is not None:
        check_mask(arguments.mask, arguments.model_output, arguments.channel_dim)
    done = objective(arguments, backend)
    if done is not None:
        result = object.__new__(PolicyLoss)
        result.__dict__["_done"] = done
        return result
    check_tensors(arguments, objective.declared)
    backend = resolve_backend(backend, arguments.model_output)
    arguments = objective.constants(arguments)
    if backend == "naive":
        check_weight_values(arguments.weights)
        loss, metrics = reference(arguments)
    else:
        loss, metrics, _ = operator(*arguments, backend)
    return PolicyLoss(loss, _named(objective.metrics, metrics, arguments.absent_metrics))


def _named(names: Sequence[str], metrics: Tensor, absent: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in zip(names, metrics.unbind(), strict=True) if name not in absent}
