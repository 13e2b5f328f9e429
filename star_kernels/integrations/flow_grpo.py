"""Flow-GRPO's step and loss (github.com/yifan123/flow_grpo, arXiv 2505.05470) with the fused kernels.

``sde_step_with_logprob`` has the signature and return values of the function in that repository. ``policy_loss``
replaces the code of its training scripts between the model output and the loss, and ``step_loss`` does the same from
the scripts' ``sample`` and ``config``. None of them causes a host sync. docs/flow-grpo.md shows how to change a script.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from star_kernels.integrations.agreement import log_prob_agreement
from star_kernels.integrations.deferred import DeferredChecks
from star_kernels.integrations.flow_grpo_policy import (
    dense_sde_step_with_logprob,
    log_prob_of,
    mean_of,
    policy_loss,
    sde_step_with_logprob,
)
from star_kernels.integrations.layout import channel_dim_of, check_shape, column
from star_kernels.integrations.record import RecordedMaps, record_maps
from star_kernels.integrations.schedule import Step, step_at
from star_kernels.policy import PolicyLoss

__all__ = [
    "RecordedMaps",
    "dense_sde_step_with_logprob",
    "policy_loss",
    "record_maps",
    "sde_step_with_logprob",
    "step_loss",
    "window",
]

_CHECKS = DeferredChecks()
_SCRIPT_OPTIONS = {"noise_level", "sde_type", "clip_range", "adv_clip_max", "beta", "channel_dim", "backend"}


def step_loss(
    scheduler: Any,
    model_output: Tensor,
    sample: Mapping[str, Tensor],
    j: int,
    config: Any,
    ref_model_output: Tensor | None = None,
    *,
    info: MutableMapping[str, list[Tensor]] | None = None,
    gradient_accumulation_steps: int = 1,
    noise_level: float | None = None,
    sde_type: str | None = None,
    clip_range: float | tuple[float, float] | None = None,
    adv_clip_max: float | None = None,
    beta: float | None = None,
    weights: Tensor | None = None,
    old_model_output: Tensor | None = None,
    old_prev_sample_mean: Tensor | None = None,
    ratio: str | None = None,
    weighted_kl: bool | None = None,
    step_weights: Tensor | None = None,
    mask: Tensor | None = None,
    channel_dim: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The loss of step ``j`` from the variables of Flow-GRPO's training scripts.

    Without "weights" and options of the objective (such as ``ratio``) it is the loss of the script, with them that of
    :func:`policy_loss`. The noise in "log_probs" is
    compared with the sampler in every call, without a host sync: on a GPU an error is raised at one of the next calls.

    Args:
        scheduler: ``pipeline.scheduler``.
        model_output: velocity of the trained model, after guidance.
        sample: the batch of the scripts: "latents", "next_latents", "timesteps", "log_probs" and "advantages", each
            ``[B, Steps, ...]``. Optional "weights" ``[B, Steps, h, w]`` are the weights of the loss and require dense
            "log_probs". With ``config.rationorm`` (GRPO-Guard) "prev_sample_mean" is required.
        j: index of the step.
        config: the config of the scripts: ``sample.noise_level``, ``train.clip_range``, ``train.adv_clip_max``,
            ``train.beta``, and ``sample.sde_type`` if it is set.
        ref_model_output: velocity of the reference model; required if ``train.beta`` is not 0.
        info: the lists of metrics of the scripts, to which those of this step are appended: ``policy_loss``,
            ``kl_loss`` (with beta), ``loss``, ``approx_kl``, ``clipfrac``, ``clipfrac_gt_one``, ``clipfrac_lt_one``,
            ``ratio_mean``, ``ratio_max``, and :func:`star_kernels.integrations.agreement.log_prob_agreement` of the
            trained model and the rollout, ``log_prob_diff/step_{j}/mean`` and ``log_prob_diff/step_{j}/max``.
        gradient_accumulation_steps: divides the loss and the metrics ``policy_loss``, ``kl_loss`` and ``loss``, as the
            scripts for Qwen-Image do.
        noise_level, sde_type, clip_range, adv_clip_max, beta, weights: in place of those of ``config`` and ``sample``.
        old_model_output, old_prev_sample_mean, ratio, weighted_kl, step_weights, mask, channel_dim, backend: see
            :func:`policy_loss`, whose defaults apply if they are None.

    Raises:
        KeyError: ``sample`` lacks a tensor.
        ValueError: the tensors of ``sample`` have different numbers of steps, or the sampler, noise level or step of
            "log_probs" is another.
        TypeError, ValueError: see :func:`policy_loss`.
    """
    guard = bool(getattr(config, "rationorm", False))
    _check_steps(sample, guard)
    given: dict[str, Any] = {
        "noise_level": config.sample.noise_level,
        "sde_type": getattr(config.sample, "sde_type", "sde"),
        "clip_range": config.train.clip_range,
        "adv_clip_max": config.train.adv_clip_max,
        "beta": config.train.beta,
        "ref_model_output": ref_model_output,
        "weights": sample["weights"][:, j] if "weights" in sample else None,
    }
    if guard:
        given["old_prev_sample_mean"] = sample["prev_sample_mean"][:, j]
    options: dict[str, Any] = {
        "noise_level": noise_level,
        "sde_type": sde_type,
        "clip_range": clip_range,
        "adv_clip_max": adv_clip_max,
        "beta": beta,
        "weights": weights,
        "old_model_output": old_model_output,
        "old_prev_sample_mean": old_prev_sample_mean,
        "ratio": ratio,
        "weighted_kl": weighted_kl,
        "step_weights": step_weights,
        "mask": mask,
        "channel_dim": channel_dim,
        "backend": backend,
    }
    options = {name: value for name, value in options.items() if value is not None}
    given |= options
    timestep, latent, prev_sample, old_log_prob, advantages = (
        sample[name][:, j] for name in ("timesteps", "latents", "next_latents", "log_probs", "advantages")
    )
    sampler = {name: given[name] for name in ("noise_level", "sde_type")}
    step = step_at(scheduler, timestep, latent, **sampler)
    _check_noise(step, old_log_prob, latent, f"step {j}", **sampler)
    arguments = (model_output, latent, prev_sample, old_log_prob, advantages)
    if guard and given["weights"] is None and options.keys() <= _SCRIPT_OPTIONS:
        loss, metrics = _guard_of_the_script(step, *arguments, **{k: given[k] for k in given.keys() - sampler.keys()})
    else:
        loss, metrics = policy_loss(scheduler, model_output, timestep, *arguments[1:], **given)
        if info is not None:
            high = given["clip_range"][1] if isinstance(given["clip_range"], tuple) else given["clip_range"]
            above = {**given, "clip_range": (1.0, high), "beta": 0.0}
            with torch.no_grad():  # only ratios above the range are outside this one
                outside = policy_loss(scheduler, model_output, timestep, *arguments[1:], **above).metrics["clipfrac"]
            metrics |= {"clipfrac_gt_one": outside, "clipfrac_lt_one": metrics["clipfrac"] - outside}
    if info is not None:
        metrics |= _agreement(step, *arguments[:4], given.get("channel_dim")).metrics(f"log_prob_diff/step_{j}")
        divided = {"policy_loss", "kl_loss", "loss"}
        for name, value in metrics.items():
            info[name].append(value / gradient_accumulation_steps if name in divided else value)
    return loss / gradient_accumulation_steps if gradient_accumulation_steps != 1 else loss


def window(scheduler: Any, timesteps: Tensor | Sequence[Tensor]) -> slice:
    """The steps of a rollout that its "timesteps" were stored for, for the ``steps`` of :meth:`RecordedMaps.weights`.

    Args:
        scheduler: ``pipeline.scheduler``, with the schedule of the rollout.
        timesteps: the timesteps of the window, as a list or a tensor ``[Steps]`` or ``[B, Steps]``.

    Raises:
        ValueError: they are not consecutive steps of the schedule.
    """
    stored = timesteps if isinstance(timesteps, Tensor) else torch.stack(list(timesteps))
    row = (stored[0] if stored.ndim == 2 else stored).tolist()
    every = scheduler.timesteps.tolist()
    for start in range(len(every) - len(row) + 1):
        if every[start : start + len(row)] == row:
            return slice(start, start + len(row))
    raise ValueError(f"timesteps must be consecutive steps of the scheduler, {every}, got {row}")


def _check_steps(sample: Mapping[str, Tensor], guard: bool) -> None:
    """Raises unless the tensors of the rollout have the same steps."""
    names = ["timesteps", "next_latents", "log_probs"]
    names += ["weights"] if "weights" in sample else []
    names += ["prev_sample_mean"] if guard else []
    steps = sample["latents"].shape[1]
    for name in names:
        if sample[name].shape[1] != steps:
            raise ValueError(
                f"{name} must have the steps of latents, {steps}, got {sample[name].shape[1]}; weights of a window of "
                "steps are recorded.weights(steps=window(pipeline.scheduler, timesteps))"
            )


def _check_noise(
    step: Step, log_prob: Tensor, latent: Tensor, place: str, *, noise_level: float, sde_type: str
) -> None:
    """Checks that the log-probability of the rollout is that of standard normal noise in this step.

    The mean square of the noise follows from it, whatever the model. Of n numbers it is 1 within sqrt(2 / n).
    """
    if not noise_level:
        return
    transition = step.transition
    with torch.no_grad():
        each = log_prob.float().flatten(1).mean(dim=1) if log_prob.ndim > 1 else log_prob.float()
        square = (transition.offset - each) / (transition.scale * transition.std.square())
        numbers = torch.stack([square, transition.scale.expand_as(square)])
    allowed = 0.05 + 8 * (2 / latent[0].numel()) ** 0.5

    def judge(numbers: Tensor) -> str | None:
        squares, scales = numbers
        if bool(scales.isnan().any()):
            return (
                f"timesteps of {place} are not in the scheduler's schedule: was set_timesteps called after the rollout?"
            )
        wrong = squares[((squares - 1).abs() > allowed) & squares.isfinite()]  # not the NaN of a diverged model
        if not len(wrong):
            return None
        return (
            f"log_probs of {place} must be those of the sampler, got sde_type={sde_type!r} and noise_level="
            f"{noise_level}, for which the mean square of the noise is {float(wrong[0]):.3g} instead of 1: the rollout "
            "used another sampler, noise level or step"
        )

    _CHECKS.add(numbers, judge)


def _agreement(
    step: Step,
    model_output: Tensor,
    latent: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    channel_dim: int | None,
) -> Any:
    """How far the log-probabilities of the trained model are from those of the rollout."""
    with torch.no_grad():
        mean = mean_of(model_output.float(), latent.float(), step.transition)
        log_prob = log_prob_of(mean, prev_sample.float(), step.transition, channel_dim_of(mean, channel_dim))
        if old_log_prob.ndim == 1:
            log_prob = log_prob.flatten(1).mean(dim=1)
        return log_prob_agreement(log_prob, old_log_prob)


def _guard_of_the_script(
    step: Step,
    model_output: Tensor,
    latent: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    old_prev_sample_mean: Tensor,
    clip_range: float | tuple[float, float],
    adv_clip_max: float,
    beta: float,
    ref_model_output: Tensor | None,
    weights: None,
    channel_dim: int | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """The loss of train_sd3_GRPO_Guard.py, which normalises by means over the batch instead of those of each sample.

    In plain PyTorch, whatever the backend.
    """
    if beta and ref_model_output is None:
        raise ValueError(f"ref_model_output must be given if beta is not 0, got None with beta={beta}")
    for name, tensor in (
        ("latents", latent),
        ("next_latents", prev_sample),
        ("prev_sample_mean", old_prev_sample_mean),
    ):
        check_shape(name, tensor, "model_output", model_output)
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    latent = latent.float()
    mean = mean_of(model_output.float(), latent, step.transition)
    log_prob = log_prob_of(mean, prev_sample.float(), step.transition, channel_dim_of(mean, channel_dim))
    change = log_prob.flatten(1).mean(dim=1) - (
        old_log_prob.float().flatten(1).mean(dim=1) if old_log_prob.ndim > 1 else old_log_prob.float()
    )
    sqrt_dt = step.sqrt_dt.mean()
    scale = sqrt_dt * step.std_dev_t.mean()
    drift = (mean - old_prev_sample_mean.float()).square().mean() / (2 * scale.square())
    ratio = torch.exp((change + drift) * scale)
    advantages = advantages.float().clamp(-adv_clip_max, adv_clip_max)
    each = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high))
    loss = policy = each.mean() / sqrt_dt.square()
    with torch.no_grad():
        above, below = (ratio - 1.0 > high).float().mean(), (1.0 - ratio > low).float().mean()
        metrics = {"policy_loss": policy.detach(), "approx_kl": 0.5 * change.detach().square().mean()}
        metrics |= {"clipfrac": above + below, "clipfrac_gt_one": above, "clipfrac_lt_one": below}
        metrics |= {"ratio_mean": ratio.mean(), "ratio_max": ratio.amax()}
    if beta:
        assert ref_model_output is not None
        squares = (mean - mean_of(ref_model_output.detach().float(), latent, step.transition)).square()
        kl_loss = (column(step.transition.kl_scale, squares) * squares).mean()
        loss = policy + beta * kl_loss
        metrics["kl_loss"] = kl_loss.detach()
    return PolicyLoss(loss, metrics | {"loss": loss.detach()})
