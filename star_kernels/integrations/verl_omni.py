"""A policy loss with weights for VeRL-Omni's registry of diffusion losses (github.com/verl-project/verl-omni).

Its losses are given means of transitions, not velocities. A transition with a = 0 and b = 1 takes the mean as the
model's output, so the kernels of :func:`star_kernels.weighted_policy_loss` serve as they are, forward and backward.

The contract is that of ``DiffusionLossFn`` in verl_omni/trainer/diffusion/diffusion_algos.py, as of mid 2026: an object
with ``required_model_output_keys``, ``required_data_keys``, ``validate_inputs(loss_name, model_output, data)`` and
``__call__(config, model_output, data)``, whose result has ``loss``, ``metrics`` and ``add_loss_metric``. Nothing of
VeRL-Omni is imported before :func:`register`. docs/verl-omni.md shows the lines that a run needs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from star_kernels.allocation import allocate
from star_kernels.integrations.layout import channel_dim_of, column, weights_like
from star_kernels.policy import PolicyLoss, Transition, weighted_policy_loss

ALGORITHMS = "verl_omni.trainer.diffusion.diffusion_algos"
ENGINES = "verl_omni.workers.engine.fsdp.diffusers_impl"
SDE_TYPES = ("sde", "cps")
WEIGHTS, MAPS = "star_weights", "star_maps"  # optional in the batch: one of them brings the allocation


class LossResult(NamedTuple):
    """What a diffusion loss returns: a loss to differentiate, and metrics."""

    loss: Tensor
    metrics: dict[str, Any]
    add_loss_metric: bool = False


def mean_transition(std_dev_t: Tensor, sqrt_dt: Tensor, *, sde_type: str = "sde") -> Transition:
    """The transition whose model output is its mean: ``prev ~ N(0 x + 1 v, std^2)``.

    Args:
        std_dev_t: Flow-GRPO's noise scale, ``[B, 1, ...]``, ``[B]`` or one number.
        sqrt_dt: ``sqrt(-dt)``, likewise.
        sde_type: "sde", a Gaussian of standard deviation ``std_dev_t sqrt(-dt)``; or "cps", of ``std_dev_t``, whose
            log-probability is ``-(prev - mean)^2`` (arXiv 2509.05952). The KL's scale is ``1 / (2 std_dev_t^2)``.
    """
    if sde_type not in SDE_TYPES:
        raise ValueError(f"sde_type must be {' or '.join(map(repr, SDE_TYPES))}, got {sde_type!r}")
    s, root = torch.broadcast_tensors(std_dev_t.detach().double().reshape(-1), sqrt_dt.detach().double().reshape(-1))
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    kl_scale = 0.5 / s.square()
    if sde_type == "cps":
        rows = (zero, one, s, one, zero, kl_scale)
    else:
        std = s * root
        rows = (zero, one, std, 0.5 / std.square(), -torch.log(std) - 0.5 * math.log(2 * math.pi), kl_scale)
    return Transition(torch.stack(rows).float())


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
    sde_type: str = "sde",
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip_max: float = 5.0,
    beta: float = 0.0,
    ref_prev_sample_mean: Tensor | None = None,
    step_weights: Tensor | None = None,
    channel_dim: int | None = None,
    **options: Any,
) -> PolicyLoss:
    """Flow-GRPO's clipped loss from the mean of the transition, with weights for the latent positions.

    Serves every trainer that keeps means: VeRL-Omni's ``prev_sample_mean``, Flow-Factory's ``next_latents_mean``.

    Args:
        prev_sample_mean: mean of the model in training, ``[B, C, H, W]``, ``[B, C, F, H, W]`` or packed ``[B, S, C]``;
            the gradient goes to it alone.
        prev_sample: the latent that the rollout drew, of that shape.
        std_dev_t, sqrt_dt, sde_type: as in :func:`mean_transition`.
        advantages: ``[B]``, clamped to ``+-adv_clip_max``.
        old_log_prob: of the rollout, ``[B]`` (serves without weights) or ``[B, *locations]``.
        old_prev_sample_mean: mean of the rollout's model. Where old_log_prob is None it stands in for it.
        weights: ``[B, *locations]`` of mean one, or a grid ``[B, h, w]``: of patches, or of a packed latent's rows.
        guard: GRPO-Guard's normalised ratio, with each sample's loss divided by -dt; needs old_prev_sample_mean.
        beta, ref_prev_sample_mean: coefficient and reference mean of the KL penalty.
        step_weights: ``[B]``, a factor of each sample's policy loss.
        clip_range, options: as in :func:`star_kernels.weighted_policy_loss`.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype or range; the message names it.
    """
    if old_prev_sample_mean is None and (guard or old_log_prob is None):
        use = "with guard=True" if guard else "where old_log_prob is None"
        raise ValueError(f"old_prev_sample_mean must be given {use}, got None")
    channel_dim = channel_dim_of(prev_sample_mean, channel_dim)
    transition = mean_transition(std_dev_t, sqrt_dt, sde_type=sde_type)
    prev_sample = prev_sample.detach()
    if old_log_prob is None:
        assert old_prev_sample_mean is not None
        squares = (prev_sample.float() - old_prev_sample_mean.detach().float()).square()
        density = column(transition.offset, squares) - column(transition.scale, squares) * squares
        old_log_prob = density.mean(dim=channel_dim)
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
        old_model_output=old_prev_sample_mean if guard else None,
        step_weights=step_weights,
        channel_dim=channel_dim,
        **options,
    )


class StarLoss:
    """Flow-GRPO's loss for VeRL-Omni, allocated where the batch brings "star_weights", or "star_maps" to make them of.

    Without them it is ``FlowGRPOLoss``. It needs the latent that was drawn, "prev_sample", which VeRL-Omni's engine
    does not hand to losses: :func:`feed_latents` makes it. Subclasses set the attributes.
    """

    required_model_output_keys: tuple[str, ...] = ("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt")
    required_data_keys: tuple[str, ...] = ("old_log_probs", "advantages", "prev_sample")
    sde_type = "sde"
    ratio = "sample"
    guard = False
    strength = 1.0  # of the allocation of maps, see allocate

    def validate_inputs(self, *, loss_name: str, model_output: Mapping[str, Any], data: Any) -> None:
        """Raises KeyError naming the tensors that are missing, and where they come from."""
        missing = [key for key in self.required_model_output_keys if key not in model_output]
        missing += [key for key in self.required_data_keys if key not in data]
        dense = WEIGHTS in data or MAPS in data or self.ratio == "location"
        if dense and "old_prev_sample_mean" not in [*data.keys(), *missing]:
            missing.append("old_prev_sample_mean")
        if missing:
            raise KeyError(
                f"diffusion loss {loss_name!r} lacks {', '.join(missing)}: prev_sample comes with "
                "star_kernels.integrations.verl_omni.feed_latents, old_prev_sample_mean with the actor's own old "
                "log-probabilities (algorithm.rollout_correction.bypass_mode=False)"
            )

    @classmethod
    def compute_loss(cls, **arguments: Any) -> tuple[Tensor, dict[str, Any]]:
        """:func:`policy_loss_of_means` with the attributes of the class; metrics under VeRL-Omni's names."""
        loss, found = policy_loss_of_means(
            **{"guard": cls.guard, "sde_type": cls.sde_type, **arguments}, ratio=cls.ratio
        )
        names = {"pg_clipfrac": "clip_fraction", "ratio_mean": "ratio_mean", "ratio_max": "ratio_max"}
        metrics = {f"actor/{ours}": found[name] for ours, name in names.items()}
        return loss, metrics | {"actor/approx_kl": found["approx_kl"]}

    def __call__(self, *, config: Any, model_output: Mapping[str, Any], data: Any) -> LossResult:
        """The loss of one step of a micro-batch.

        Args:
            config: actor's; ``diffusion_loss.clip_ratio`` and ``diffusion_loss.adv_clip_max`` are read.
            model_output: "prev_sample_mean" [B, ...], "std_dev_t" [B, 1, ...] and "sqrt_dt" [B].
            data: "old_log_probs" [B], "advantages" [B], "prev_sample" [B, ...]; optional "star_weights" or
                "star_maps", [B, h, w] or [B, *locations], "old_prev_sample_mean" [B, ...] (with either of them, with
                ratio="location" and for GRPO-Guard) and "rollout_is_weights" [B].

        Returns:
            The loss and metrics, which are tensors: their values are not waited for here.
        """
        weights, maps = data.get(WEIGHTS, None), data.get(MAPS, None)
        if weights is None and maps is not None:
            weights = allocate(maps.flatten(1), strength=self.strength).view_as(maps)
        loss, metrics = self.compute_loss(
            prev_sample_mean=model_output["prev_sample_mean"],
            prev_sample=data["prev_sample"],
            std_dev_t=model_output["std_dev_t"],
            sqrt_dt=model_output["sqrt_dt"],
            advantages=data["advantages"],
            old_log_prob=data["old_log_probs"] if weights is None and self.ratio == "sample" else None,
            old_prev_sample_mean=data.get("old_prev_sample_mean", None),
            weights=weights,
            step_weights=data.get("rollout_is_weights", None),
            clip_range=config.diffusion_loss.clip_ratio,
            adv_clip_max=config.diffusion_loss.adv_clip_max,
        )
        return LossResult(loss, metrics)


class StarGuardLoss(StarLoss):
    """GRPO-Guard's loss for VeRL-Omni (``GRPOGuardLoss``), with weights where the batch brings them."""

    required_data_keys = (*StarLoss.required_data_keys, "old_prev_sample_mean")
    guard = True


def register(
    name: str = "flow_grpo", loss: type[StarLoss] = StarLoss, *, sde_type: str = "sde", ratio: str = "sample"
) -> type[StarLoss]:
    """Registers the loss with VeRL-Omni, and lets its FSDP engine hand over latents.

    Args:
        name: the ``loss_mode`` that it answers to. VeRL-Omni's configuration knows a fixed list of names, so the
            default takes the place of its own loss of that name, whose values it has without weights.
        loss: :class:`StarLoss`, :class:`StarGuardLoss` (for "grpo_guard"), or a subclass.
        sde_type, ratio: the rollout's sampler, and the kind of ratio that weights act on.

    Returns:
        The class that was registered, also a subclass of VeRL-Omni's ``DiffusionLossFn``.

    Raises:
        ImportError: VeRL-Omni is not installed.
    """
    try:
        algorithms = importlib.import_module(ALGORITHMS)
    except ImportError as error:
        raise ImportError(f"register() needs VeRL-Omni ({ALGORITHMS}): {error}") from error
    base = getattr(algorithms, "DiffusionLossFn", object)
    bases = (loss,) if base is object else (loss, base)
    made = type(loss.__name__, bases, {"sde_type": sde_type, "ratio": ratio, "__doc__": loss.__doc__})
    algorithms.register_diffusion_loss(name)(made)
    engines = importlib.import_module(ENGINES)
    for engine in ("PPODiffusersFSDPEngine", "DiffusersFSDPEngine"):  # its name now, and before mid 2026
        if hasattr(engines, engine):
            feed_latents(getattr(engines, engine))
            break
    return made


def feed_latents(engine: type[Any]) -> type[Any]:
    """Lets an engine's ``forward_step(micro_batch, loss_function, forward_only, step)`` hand latents to its loss.

    The class is changed, once; without a loss function, or with a loss that reads none of it, nothing differs.
    """
    forward_step = engine.forward_step
    if getattr(forward_step, "feeds_latents", False):
        return engine

    @wraps(forward_step)
    def feeding(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool, step: int) -> Any:
        if loss_function is not None:
            loss_function = with_latents(loss_function, micro_batch, step)
        return forward_step(self, micro_batch, loss_function=loss_function, forward_only=forward_only, step=step)

    feeding.feeds_latents = True  # type: ignore[attr-defined]
    engine.forward_step = feeding
    return engine


def with_latents(loss_function: Callable[..., Any], micro_batch: Any, step: int) -> Callable[..., Any]:
    """The loss function, with "prev_sample" and, where the batch has them, weights or maps added to its ``data``.

    Args:
        micro_batch: with "all_latents" ``[B, Steps + 1, ...]`` and optional "star_weights" or "star_maps"
            ``[B, Steps, ...]``.
        step: the number of the step in them.
    """

    @wraps(loss_function)
    def called(*arguments: Any, data: Any, **options: Any) -> Any:
        data["prev_sample"] = micro_batch["all_latents"][:, step + 1].float()
        for key in (WEIGHTS, MAPS):
            if micro_batch.get(key, None) is not None:
                data[key] = micro_batch[key][:, step]
        return loss_function(*arguments, data=data, **options)

    return called
