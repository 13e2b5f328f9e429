"""A policy loss with weights for VeRL-Omni's registry of diffusion losses (github.com/verl-project/verl-omni).

VeRL-Omni passes means of transitions to its losses instead of velocities: :mod:`star_kernels.integrations.means`.

The interface is that of ``DiffusionLossFn`` in verl_omni/trainer/diffusion/diffusion_algos.py as of mid 2026: an object
with ``required_model_output_keys``, ``required_data_keys``, ``validate_inputs(loss_name, model_output, data)`` and
``__call__(config, model_output, data)``, which returns ``loss``, ``metrics`` and ``add_loss_metric``. VeRL-Omni is not
imported before :func:`register`. docs/verl-omni.md shows how to use it in a run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor

from star_kernels.allocation import allocate
from star_kernels.integrations.layout import map_layout
from star_kernels.integrations.means import mean_transition, policy_loss_of_means, ratio_of_means
from star_kernels.integrations.record import RecordedMaps, record_maps
from star_kernels.selection import TokenSelection

__all__ = [
    "LossResult",
    "StarGuardLoss",
    "StarLoss",
    "feed_latents",
    "mean_transition",
    "policy_loss_of_means",
    "ratio_of_means",
    "register",
    "with_latents",
]

ALGORITHMS = "verl_omni.trainer.diffusion.diffusion_algos"
ENGINES = "verl_omni.workers.engine.fsdp.diffusers_impl"
WEIGHTS, MAPS = "star_weights", "star_maps"  # optional keys of the batch

Select = Callable[[Any], TokenSelection]


class LossResult(NamedTuple):
    """The result of a diffusion loss."""

    loss: Tensor
    metrics: dict[str, Any]
    add_loss_metric: bool = False


class StarLoss:
    """Flow-GRPO's loss for VeRL-Omni, with weights if the batch has "star_weights", or "star_maps" to compute them.

    Without these keys it equals VeRL-Omni's ``FlowGRPOLoss``. It requires the sampled latent, "prev_sample", which
    VeRL-Omni's engine does not pass to losses; :func:`feed_latents` adds it. Subclasses override the attributes.
    """

    required_model_output_keys: tuple[str, ...] = ("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt")
    required_data_keys: tuple[str, ...] = ("old_log_probs", "advantages", "prev_sample")
    sde_type = "sde"
    ratio = "sample"
    guard = False
    strength = 1.0  # of allocate, for "star_maps"

    def validate_inputs(self, *, loss_name: str, model_output: Mapping[str, Any], data: Any) -> None:
        """Raises a KeyError that names missing tensors and how to provide them."""
        missing = [key for key in self.required_model_output_keys if key not in model_output]
        missing += [key for key in self.required_data_keys if key not in data]
        dense = WEIGHTS in data or MAPS in data or self.ratio == "location"
        if dense and "old_prev_sample_mean" not in [*data.keys(), *missing]:
            missing.append("old_prev_sample_mean")
        if missing:
            raise KeyError(
                f"diffusion loss {loss_name!r} lacks {', '.join(missing)}: prev_sample is added by "
                "star_kernels.integrations.verl_omni.feed_latents, old_prev_sample_mean by the actor's own pass for "
                "old log-probabilities (algorithm.rollout_correction.bypass_mode=False)"
            )

    @classmethod
    def compute_loss(cls, **arguments: Any) -> tuple[Tensor, dict[str, Any]]:
        """:func:`policy_loss_of_means` with the attributes of the class, and metrics named as in VeRL-Omni."""
        loss, found = policy_loss_of_means(
            **{"guard": cls.guard, "sde_type": cls.sde_type, **arguments}, ratio=cls.ratio
        )
        names = {"pg_clipfrac": "clip_fraction", "ratio_mean": "ratio_mean", "ratio_max": "ratio_max"}
        metrics = {f"actor/{ours}": found[name] for ours, name in names.items()}
        return loss, metrics | {"actor/approx_kl": found["approx_kl"]}

    def __call__(self, *, config: Any, model_output: Mapping[str, Any], data: Any) -> LossResult:
        """The loss of one step of a micro-batch.

        Args:
            config: the config of the actor, with ``diffusion_loss.clip_ratio`` and ``diffusion_loss.adv_clip_max``.
            model_output: "prev_sample_mean" [B, ...], "std_dev_t" [B, 1, ...] and "sqrt_dt" [B].
            data: "old_log_probs" [B], "advantages" [B], "prev_sample" [B, ...]; optional "star_weights" or
                "star_maps", each [B, h, w] or [B, *locations], and "rollout_is_weights" [B]; "old_prev_sample_mean"
                [B, ...] is required with either of the former, with ratio="location" and for GRPO-Guard.

        Returns:
            The loss and metrics, as tensors, without a host sync.
        """
        weights, maps = data.get(WEIGHTS, None), data.get(MAPS, None)
        if weights is None and maps is not None:
            weights = allocate(maps, layout=map_layout(maps), strength=self.strength)
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
    """GRPO-Guard's loss for VeRL-Omni (``GRPOGuardLoss``), with weights if the batch has them."""

    required_data_keys = (*StarLoss.required_data_keys, "old_prev_sample_mean")
    guard = True


def register(
    name: str = "flow_grpo",
    loss: type[StarLoss] = StarLoss,
    *,
    sde_type: str = "sde",
    ratio: str = "sample",
    select: Select | None = None,
    **capture: Any,
) -> type[StarLoss]:
    """Registers the loss in VeRL-Omni, and patches its FSDP engine to pass latents and maps to the loss.

    Args:
        name: the ``loss_mode`` of the loss. VeRL-Omni's configuration accepts a fixed list of names, so the default
            replaces its own loss of that name; without weights the values are the same.
        loss: :class:`StarLoss`, :class:`StarGuardLoss` (for "grpo_guard"), or a subclass.
        sde_type: sampler of the rollout, "sde" or "cps".
        ratio: "sample" or "location", see :func:`star_kernels.weighted_policy_loss`.
        select, capture: see :func:`feed_latents`.

    Returns:
        The registered class, a subclass of ``loss`` and of VeRL-Omni's ``DiffusionLossFn``.

    Raises:
        ImportError: VeRL-Omni is not installed.
    """
    try:
        algorithms = importlib.import_module(ALGORITHMS)
    except ImportError as error:
        raise ImportError(f"register() requires VeRL-Omni ({ALGORITHMS}): {error}") from error
    base = getattr(algorithms, "DiffusionLossFn", object)
    bases = (loss,) if base is object else (loss, base)
    made = type(loss.__name__, bases, {"sde_type": sde_type, "ratio": ratio, "__doc__": loss.__doc__})
    algorithms.register_diffusion_loss(name)(made)
    engines = importlib.import_module(ENGINES)
    for engine in ("PPODiffusersFSDPEngine", "DiffusersFSDPEngine"):  # the second is its name before mid 2026
        if hasattr(engines, engine):
            feed_latents(getattr(engines, engine), select, **capture)
            break
    return made


def feed_latents(engine: type[Any], select: Select | None = None, **capture: Any) -> type[Any]:
    """Patches an engine's ``forward_step(micro_batch, loss_function, forward_only, step)`` to pass latents to its loss.

    The class is modified in place; a second call only replaces ``select`` and ``capture``. Calls without a loss
    function are unchanged.

    Args:
        engine: the engine class, whose instances have the diffusers model as ``module``.
        select: a function that returns the selected tokens of a micro-batch, on the model's device. The maps of the
            first forward pass of the step (the conditional one) are then passed to the loss as "star_maps", detached.
            They are maps of the trained model, which equals the model of the rollout in the first update only. If
            None, no maps are captured.
        capture: options of :func:`star_kernels.capture.capture_maps`; ``cfg`` is None by default.
    """
    engine.star_select = staticmethod(select) if select is not None else None
    engine.star_capture = capture
    forward_step = engine.forward_step
    if getattr(forward_step, "feeds_latents", False):
        return engine

    @wraps(forward_step)
    def patched(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool, step: int) -> Any:
        if loss_function is None:
            return forward_step(self, micro_batch, loss_function=None, forward_only=forward_only, step=step)
        choose = type(self).star_select
        options = {"cfg": None, **type(self).star_capture}
        recording = record_maps(self.module, choose(micro_batch), **options) if choose else nullcontext()
        with recording as recorded:
            fed = with_latents(loss_function, micro_batch, step, recorded)
            return forward_step(self, micro_batch, loss_function=fed, forward_only=forward_only, step=step)

    patched.feeds_latents = True  # type: ignore[attr-defined]
    engine.forward_step = patched
    return engine


def with_latents(
    loss_function: Callable[..., Any], micro_batch: Any, step: int, recorded: RecordedMaps | None = None
) -> Callable[..., Any]:
    """Wraps a loss function to add "prev_sample", and weights or maps if there are any, to its ``data``.

    Args:
        loss_function: the loss function of the engine.
        micro_batch: has "all_latents" ``[B, Steps + 1, ...]``, and optionally "star_weights" or "star_maps"
            ``[B, Steps, ...]``.
        step: index of the step.
        recorded: maps of the forward passes of the step, of which the first are used.
    """

    @wraps(loss_function)
    def called(*arguments: Any, data: Any, **options: Any) -> Any:
        data["prev_sample"] = micro_batch["all_latents"][:, step + 1].float()
        for key in (WEIGHTS, MAPS):
            if micro_batch.get(key, None) is not None:
                data[key] = micro_batch[key][:, step]
        if recorded is not None:
            data[MAPS] = recorded.maps[0].sum(dim=1)
        return loss_function(*arguments, data=data, **options)

    return called
