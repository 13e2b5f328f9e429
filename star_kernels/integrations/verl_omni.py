"""A policy loss with weights for VeRL-Omni's registry of diffusion losses (github.com/verl-project/verl-omni).

Its losses are given means of transitions, not velocities: :mod:`star_kernels.integrations.means`.

The contract is that of ``DiffusionLossFn`` in verl_omni/trainer/diffusion/diffusion_algos.py, as of mid 2026: an object
with ``required_model_output_keys``, ``required_data_keys``, ``validate_inputs(loss_name, model_output, data)`` and
``__call__(config, model_output, data)``, whose result has ``loss``, ``metrics`` and ``add_loss_metric``. Nothing of
VeRL-Omni is imported before :func:`register`. docs/verl-omni.md shows the lines that a run needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor

from star_kernels.allocation import allocate
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
WEIGHTS, MAPS = "star_weights", "star_maps"  # optional in the batch: one of them brings the allocation

Select = Callable[[Any], TokenSelection]


class LossResult(NamedTuple):
    """What a diffusion loss returns: a loss to differentiate, and metrics."""

    loss: Tensor
    metrics: dict[str, Any]
    add_loss_metric: bool = False


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
    name: str = "flow_grpo",
    loss: type[StarLoss] = StarLoss,
    *,
    sde_type: str = "sde",
    ratio: str = "sample",
    select: Select | None = None,
    **capture: Any,
) -> type[StarLoss]:
    """Registers the loss with VeRL-Omni, and lets its FSDP engine hand over latents, and maps.

    Args:
        name: the ``loss_mode`` that it answers to. VeRL-Omni's configuration knows a fixed list of names, so the
            default takes the place of its own loss of that name, whose values it has without weights.
        loss: :class:`StarLoss`, :class:`StarGuardLoss` (for "grpo_guard"), or a subclass.
        sde_type, ratio: the rollout's sampler, and the kind of ratio that weights act on.
        select, capture: as in :func:`feed_latents`.

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
            feed_latents(getattr(engines, engine), select, **capture)
            break
    return made


def feed_latents(engine: type[Any], select: Select | None = None, **capture: Any) -> type[Any]:
    """Lets an engine's ``forward_step(micro_batch, loss_function, forward_only, step)`` hand latents to its loss.

    The class is changed; a second call changes its ``select`` alone. Without a loss function nothing differs.

    Args:
        engine: the class, whose instances hold the diffusers model as ``module``.
        select: gives the core tokens of a micro-batch's prompts, on the model's device: the maps of its own forward
            pass, the first of a step (the conditional one), then come as "star_maps". They are those of the model in
            training, detached; at the first update of a rollout that is the rollout's model. None captures nothing.
        capture: options of :func:`star_kernels.capture.capture_maps`; ``cfg`` is None.
    """
    engine.star_select = staticmethod(select) if select is not None else None
    engine.star_capture = capture
    forward_step = engine.forward_step
    if getattr(forward_step, "feeds_latents", False):
        return engine

    @wraps(forward_step)
    def feeding(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool, step: int) -> Any:
        if loss_function is None:
            return forward_step(self, micro_batch, loss_function=None, forward_only=forward_only, step=step)
        choose = type(self).star_select
        options = {"cfg": None, **type(self).star_capture}
        recording = record_maps(self.module, choose(micro_batch), **options) if choose else nullcontext()
        with recording as recorded:
            fed = with_latents(loss_function, micro_batch, step, recorded)
            return forward_step(self, micro_batch, loss_function=fed, forward_only=forward_only, step=step)

    feeding.feeds_latents = True  # type: ignore[attr-defined]
    engine.forward_step = feeding
    return engine


def with_latents(
    loss_function: Callable[..., Any], micro_batch: Any, step: int, recorded: RecordedMaps | None = None
) -> Callable[..., Any]:
    """The loss function, with "prev_sample" and, where there are any, weights or maps added to its ``data``.

    Args:
        micro_batch: with "all_latents" ``[B, Steps + 1, ...]`` and optional "star_weights" or "star_maps"
            ``[B, Steps, ...]``.
        step: the number of the step in them.
        recorded: maps of the step's forward passes, of which the first counts.
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
