"""VeRL-Omni's losses with weights, as mixins: a registered class inherits from one of them and from VeRL-Omni's class.

A batch without weights goes to VeRL-Omni's class, unchanged. VeRL-Omni passes the mean of the transition to a loss, so
the log-probability of a location is computed from the means (:mod:`star_kernels.integrations.means`), and compared with
the log-probability of the adapter in every call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from star_kernels.allocation import allocate
from star_kernels.integrations.layout import channel_dim_of, column, map_layout, weights_like
from star_kernels.integrations.means import log_prob_of_means, mean_transition, policy_loss_of_means
from star_kernels.integrations.sampler_check import SamplerCheck
from star_kernels.policy import Transition, weighted_nft_loss, weighted_policy_loss
from star_kernels.policy.naive import LEAST_ERROR, location_mean, upsample
from star_kernels.policy.transitions import ROWS

# Keys that feed_latents adds to the data of a loss.
WEIGHTS, MAPS, SDE_TYPE = "star_weights", "star_maps", "star_sde_type"
NEXT_LATENT, OLD_MEAN = "prev_sample", "old_prev_sample_mean"
# Keys that a loss with weights adds: log-probabilities of locations.
NEW_LOG_PROB, OLD_LOG_PROB = "star_log_prob", "star_old_log_prob"

check = SamplerCheck()

Found = tuple[Tensor, dict[str, Tensor]]


class LossResult(NamedTuple):
    """The fields of VeRL-Omni's DiffusionLossResult."""

    loss: Tensor
    metrics: dict[str, Any]
    add_loss_metric: bool = False


@dataclass(frozen=True)
class Options:
    """How a loss uses weights.

    Args:
        ratio: "sample" or "location", see :func:`star_kernels.weighted_policy_loss`. "location" is used without
            weights too.
        strength, cap: of :func:`star_kernels.allocate`, for "star_maps".
        sde_type: the sampler; None for that of the engine's model config.
        maps_expected: whether a batch without weights and maps is an error.
    """

    ratio: str = "sample"
    strength: float = 1.0
    cap: float | None = None
    sde_type: str | None = None
    maps_expected: bool = False

    def __post_init__(self) -> None:
        if self.ratio not in ("sample", "location"):
            raise ValueError(f"ratio must be 'sample' or 'location', got {self.ratio!r}")


class StarLoss:
    """A loss of VeRL-Omni that refuses weights. Subclasses support them.

    Attributes:
        name: its ``loss_mode``. VeRL-Omni also adds some losses to the one of this mode (KL, distillation); these
            ignore weights.
    """

    name = ""
    options = Options()

    def validate_inputs(self, *, loss_name: str, model_output: Mapping[str, Any], data: Any) -> None:
        """Raises a KeyError that names missing tensors: VeRL-Omni's own, and with weights those that they require."""
        super().validate_inputs(loss_name=loss_name, model_output=model_output, data=data)  # type: ignore[misc]
        if self.options.maps_expected and not _has_weights(data):
            raise KeyError(
                f"diffusion loss {loss_name!r} lacks star_maps, although register() was given select: the engine must "
                "be patched with star_kernels.integrations.verl_omni.feed_latents(EngineClass, select)"
            )
        if self.acts_on(data):
            missing = [key for key in self.required_outputs() if key not in model_output]
            missing += [key for key in self.required_data() if key not in data]
            if missing:
                raise KeyError(
                    f"diffusion loss {loss_name!r} with weights lacks {', '.join(missing)}: prev_sample and "
                    "star_sde_type are added by star_kernels.integrations.verl_omni.feed_latents(EngineClass), if the "
                    "batch has all_next_latents, or one latent more in all_latents than steps in all_timesteps; "
                    "old_prev_sample_mean by the actor's own pass for old log-probabilities "
                    "(algorithm.rollout_correction.bypass_mode=False)"
                )

    def __call__(self, *, config: Any, model_output: Mapping[str, Any], data: Any) -> Any:
        """The loss of one step of a micro-batch, see VeRL-Omni's class.

        Args:
            config: the config of the actor.
            model_output: the outputs of the engine.
            data: the batch. Optional "star_weights" or "star_maps" are each ``[B, h, w]`` or ``[B, *locations]``.
        """
        if not self.acts_on(data) or getattr(config.diffusion_loss, "loss_mode", self.name) != self.name:
            return super().__call__(config=config, model_output=model_output, data=data)  # type: ignore[misc]
        weights = data.get(WEIGHTS, None)
        if weights is None and _has_weights(data):
            maps = data[MAPS]
            weights = allocate(maps, layout=map_layout(maps), strength=self.options.strength, cap=self.options.cap)
        loss, metrics = self.loss_with_weights(config.diffusion_loss, model_output, data, weights)
        return LossResult(loss, {f"actor/{name}": value for name, value in metrics.items()})

    def acts_on(self, data: Any) -> bool:
        """Whether the batch needs the loss with weights."""
        return _has_weights(data)

    def required_outputs(self) -> tuple[str, ...]:
        return ()

    def required_data(self) -> tuple[str, ...]:
        return ()

    def loss_with_weights(
        self, settings: Any, model_output: Mapping[str, Any], data: Any, weights: Tensor | None
    ) -> Found:
        raise NotImplementedError(
            f"loss_mode={self.name!r} does not support weights: use flow_grpo, dance_grpo, grpo_guard, flow_dppo "
            "or diffusion_nft, or remove select, star_weights and star_maps"
        )


class _OfTransitions(StarLoss):
    """Losses of the ratio of a transition."""

    def acts_on(self, data: Any) -> bool:
        return _has_weights(data) or self.options.ratio == "location"

    def required_outputs(self) -> tuple[str, ...]:
        return ("prev_sample_mean", "std_dev_t", "sqrt_dt")

    def required_data(self) -> tuple[str, ...]:
        return (NEXT_LATENT, OLD_MEAN) if self.options.sde_type else (NEXT_LATENT, OLD_MEAN, SDE_TYPE)

    def loss_with_weights(
        self, settings: Any, model_output: Mapping[str, Any], data: Any, weights: Tensor | None
    ) -> Found:
        sde_type = self.options.sde_type or _text(data[SDE_TYPE])
        prev_sample, scales = data[NEXT_LATENT], (model_output["std_dev_t"], model_output["sqrt_dt"])
        means = model_output["prev_sample_mean"], data[OLD_MEAN]
        given = {"log_probs": model_output["log_probs"], "old_log_probs": data["old_log_probs"]}
        for (name, log_prob), mean in zip(given.items(), means, strict=True):
            check.add(log_prob, mean, prev_sample, *scales, sde_type=sde_type, name=name)
        transition = mean_transition(*scales, sde_type=sde_type)
        new, old = (log_prob_of_means(mean, prev_sample, transition) for mean in means)  # [B, *locations]
        data[NEW_LOG_PROB], data[OLD_LOG_PROB] = new.detach(), old
        weights = weights_like(weights, prev_sample)
        full = torch.ones_like(old) if weights is None else upsample(weights, old.shape)
        return self.of_locations(settings, model_output, data, sde_type, weights, full, new)

    def of_locations(
        self,
        settings: Any,
        model_output: Mapping[str, Any],
        data: Any,
        sde_type: str,
        weights: Tensor | None,
        full: Tensor,
        new: Tensor,
    ) -> Found:
        """The loss from log-probabilities of locations, with the weights as given and at every location."""
        raise NotImplementedError

    def log_ratio(self, change: Tensor, full: Tensor) -> Tensor:
        """The logarithm of the ratios that are clipped, ``[B]`` or ``[B, *locations]``, from that of locations."""
        return change if self.options.ratio == "location" else location_mean(full * change, None)


class Clipped(_OfTransitions):
    """Flow-GRPO's loss with weights, computed by the fused kernels."""

    def of_locations(
        self,
        settings: Any,
        model_output: Mapping[str, Any],
        data: Any,
        sde_type: str,
        weights: Tensor | None,
        full: Tensor,
        new: Tensor,
    ) -> Found:
        loss, _ = policy_loss_of_means(
            model_output["prev_sample_mean"],
            data[NEXT_LATENT],
            model_output["std_dev_t"],
            model_output["sqrt_dt"],
            data["advantages"],
            old_log_prob=data[OLD_LOG_PROB],
            weights=weights,
            sde_type=sde_type,
            ratio=self.options.ratio,
            clip_range=settings.clip_ratio,
            adv_clip_max=settings.adv_clip_max,
            step_weights=data.get("rollout_is_weights", None),
        )
        log_ratio = self.log_ratio(data[NEW_LOG_PROB] - data[OLD_LOG_PROB], full)
        return loss, ratio_metrics(log_ratio, log_ratio.exp(), settings.clip_ratio)


class Masked(_OfTransitions):
    """Flow-DPPO's loss with weights, computed by the fused kernels.

    As in VeRL-Omni advantages are not clamped, and the standard deviation that the divergence is divided by is
    ``std_dev_t sqrt_dt`` for every sampler, or 1 without ``add_kl_coefficient``.
    """

    def of_locations(
        self,
        settings: Any,
        model_output: Mapping[str, Any],
        data: Any,
        sde_type: str,
        weights: Tensor | None,
        full: Tensor,
        new: Tensor,
    ) -> Found:
        mean, old_mean, advantages = model_output["prev_sample_mean"], data[OLD_MEAN], data["advantages"]
        std_dev_t, sqrt_dt, threshold = model_output["std_dev_t"], model_output["sqrt_dt"], settings.kl_mask_threshold
        table = mean_transition(std_dev_t, sqrt_dt, sde_type=sde_type).coefficients
        std = (std_dev_t.reshape(-1) * sqrt_dt.reshape(-1)).detach().float()
        table[ROWS.index("std")] = std if settings.add_kl_coefficient else 1.0  # of the divergence alone
        channel_dim, given = channel_dim_of(mean, None), data.get("rollout_is_weights", None)
        loss, _ = weighted_policy_loss(
            mean,
            data[NEXT_LATENT],
            data[NEXT_LATENT],
            data[OLD_LOG_PROB].float(),
            advantages.float(),
            Transition(table),
            weights=weights,
            ratio=self.options.ratio,
            advantage_clip=math.inf,
            old_model_output=old_mean,
            kl_mask_threshold=threshold,
            step_weights=given,
            channel_dim=channel_dim,
        )
        log_ratio = self.log_ratio(data[NEW_LOG_PROB] - data[OLD_LOG_PROB], full)
        change = (mean.detach().float() - old_mean.float()).square().mean(dim=channel_dim)
        divergence = change / (2 * column(table[ROWS.index("std")], change).square())
        if self.options.ratio == "sample":
            divergence = location_mean(divergence, None)
        return loss, mask_metrics(log_ratio, divergence, advantages, threshold)


class Guarded(_OfTransitions):
    """GRPO-Guard's loss with weights.

    As in VeRL-Omni the ratio is normalised by the mean noise scale of the micro-batch, even if its samples are at
    different timesteps. The kernels normalise each sample by its own scale, so they are not used.
    """

    def of_locations(
        self,
        settings: Any,
        model_output: Mapping[str, Any],
        data: Any,
        sde_type: str,
        weights: Tensor | None,
        full: Tensor,
        new: Tensor,
    ) -> Found:
        sqrt_dt = model_output["sqrt_dt"].mean()
        scale = sqrt_dt * model_output["std_dev_t"].mean()
        mean, old_mean = model_output["prev_sample_mean"], data[OLD_MEAN]
        drift = (mean - old_mean).square().mean(dim=channel_dim_of(mean, None))
        change = new - data[OLD_LOG_PROB]
        log_ratio = self.log_ratio((change + drift / (2 * scale**2)) * scale, full)
        ratio = log_ratio.exp()
        limit, low, high = settings.adv_clip_max, 1 - settings.clip_ratio, 1 + settings.clip_ratio
        advantages = data["advantages"].clamp(-limit, limit)
        advantages = advantages.reshape(-1, *[1] * (ratio.ndim - 1))
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
        if ratio.ndim > 1:
            losses = location_mean(full * losses, None)
        given = data.get("rollout_is_weights", None)
        losses = losses if given is None else losses * given.detach()
        plain = self.log_ratio(change.detach(), full)
        return losses.mean() / sqrt_dt**2, ratio_metrics(plain, ratio.detach(), settings.clip_ratio)


class ForwardProcess(StarLoss):
    """DiffusionNFT's loss with weights, computed by the fused kernels."""

    def loss_with_weights(
        self, settings: Any, model_output: Mapping[str, Any], data: Any, weights: Tensor | None
    ) -> Found:
        if settings.adaptive_weight_min != LEAST_ERROR:
            raise ValueError(
                f"diffusion_loss.adaptive_weight_min must be {LEAST_ERROR:g} with weights, got "
                f"{settings.adaptive_weight_min:g}"
            )
        names = ("forward_prediction", "old_prediction", "ref_forward_prediction", "x0", "xt", "t_expanded")
        prediction, old, reference, x0, xt, sigma = (model_output[name] for name in names)
        likely = data["reward_prob"].float()
        likely = likely.flatten(1).mean(dim=1) if likely.ndim > 1 else likely
        limit, coefficient = settings.adv_clip_max, settings.ref_kl_coef
        loss, found = weighted_nft_loss(
            prediction.float(),
            old.detach().float(),
            ((xt.float() - x0.float()) / sigma.float()).detach(),
            (2 * likely - 1) * limit,
            sigma.float().reshape(-1),
            weights=weights_like(weights, prediction),
            beta=settings.mix_beta,
            advantage_clip=limit,
            ref_model_output=reference.detach().float(),
            kl_coef=coefficient,
            channel_dim=channel_dim_of(prediction, None),
        )
        renamed = {"ref_kl_loss": "kl_loss", "old_deviate": "deviation"}
        metrics = {name: found[name] for name in ("policy_loss", "positive_loss", "negative_loss")}
        metrics |= {theirs: found[ours] for theirs, ours in renamed.items()}
        return loss, metrics | {"reward_prob_mean": likely.mean(), "total_loss": loss.detach()}


def ratio_metrics(log_ratio: Tensor, ratio: Tensor, clip: float) -> dict[str, Tensor]:
    """The metrics of VeRL-Omni's losses, and ``ratio_max`` and ``approx_kl``, without a host sync."""
    above, below = ratio - 1 > clip, 1 - ratio > clip
    return {
        "ppo_kl": -log_ratio.mean(),
        "pg_clipfrac": (above | below).float().mean(),
        "pg_clipfrac_higher": above.float().mean(),
        "pg_clipfrac_lower": below.float().mean(),
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std(),
        "ratio_max": ratio.max(),
        "approx_kl": 0.5 * log_ratio.square().mean(),
    }


def mask_metrics(log_ratio: Tensor, divergence: Tensor, advantages: Tensor, threshold: float) -> dict[str, Tensor]:
    """The metrics of VeRL-Omni's Flow-DPPO, without a host sync."""
    ratio, high = log_ratio.exp(), divergence >= threshold
    advantages = advantages.reshape(-1, *[1] * (ratio.ndim - 1))
    positive, negative = high & (ratio > 1) & (advantages > 0), high & (ratio < 1) & (advantages < 0)
    fractions = {
        "kl_mask_fraction": high,
        "pos_rm_fraction": positive,
        "neg_rm_fraction": negative,
        "masked_fraction": positive | negative,
        "unmasked_fraction": ~(positive | negative),
    }
    return {
        "ppo_kl": -log_ratio.mean(),
        "approx_kl": 0.5 * log_ratio.square().mean(),
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std(unbiased=False),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "kl_new_old_mean": divergence.mean(),
        "kl_new_old_max": divergence.max(),
        **{name: chosen.float().mean() for name, chosen in fractions.items()},
    }


def _has_weights(data: Any) -> bool:
    return any(key in data.keys() for key in (WEIGHTS, MAPS))  # noqa: SIM118 (of a TensorDict)


def _text(value: Any) -> str:
    """A string, which TensorDict may wrap."""
    return str(getattr(value, "data", value))
