"""STAR in Flow-Factory (github.com/X-GenGroup/Flow-Factory): its GRPO trainers with weights for the positions.

:func:`register` replaces the trainers "grpo" and "grpo-guard" by subclasses. Rollout, advantages, clip, KL penalty and
optimiser steps are Flow-Factory's. Without ``select`` the numbers are its own; with it, the log-ratio of a sample is
``mean_p W_p d_p``, where d is the channel-mean log-ratio at a position. docs/flow-factory.md shows how to use it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from star_kernels.allocation import allocate
from star_kernels.integrations.agreement import log_prob_agreement
from star_kernels.integrations.layout import map_layout
from star_kernels.integrations.means import log_prob_of_means, mean_transition, ratio_of_means
from star_kernels.integrations.record import record_maps
from star_kernels.integrations.sampler_check import SamplerCheck
from star_kernels.selection import TokenSelection

__all__ = ["register", "star"]

TRAINERS, REGISTRY = "flow_factory.trainers.rl.grpo", "flow_factory.trainers.registry"
CLASSES = {"grpo": "GRPOTrainer", "grpo-guard": "GRPOGuardTrainer"}
HOOKS = ("_replay_forward", "_require_policy_log_prob", "_canonical_return_fields", "_apply_optimizer_step")
MINIMUM = "a version of Flow-Factory with trainers/rl/grpo.py (commit b30dc00; main of May 2026 is too old)"
SAMPLERS = {"Flow-SDE": "sde", "Dance-SDE": "sde", "CPS": "cps"}  # dynamics_type: sampler of mean_transition
_SMALLEST = torch.finfo(torch.float32).tiny

Select = Callable[[Any, Any], TokenSelection]


class _Star:
    """The part of the subclasses that is the same for both trainers."""

    star_select: Select | None = None
    star_strength, star_cap = 1.0, None
    star_capture: Mapping[str, Any] = {}

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._check = SamplerCheck()
        self._agreements: dict[str, list[Tensor]] = {}
        self._replayed: tuple[Any, Any] | None = None  # batch and transition of the last forward pass
        self._maps: Tensor | None = None

    @property
    def _guards(self) -> bool:
        """Whether the trainer clips a ratio that it computes itself."""
        return hasattr(self, "_guard_ratio")

    def generate_samples(self, *arguments: Any, **options: Any) -> Any:
        """With weights, the rollout also stores the means of its transitions."""
        if self.star_select is not None and options.get("compute_log_prob"):
            extra = [*(options.get("extra_call_back_kwargs") or ())]
            options["extra_call_back_kwargs"] = list(dict.fromkeys([*extra, "next_latents_mean"]))
        return super().generate_samples(*arguments, **options)  # type: ignore[misc]

    def _canonical_return_fields(self, fields: Any) -> Any:
        if self.star_select is not None:
            fields = {*fields, "log_prob", "next_latents_mean", "std_dev_t", "dt"}
        return super()._canonical_return_fields(fields)  # type: ignore[misc]

    def _replay_forward(self, batch: Any, replay: Any, return_fields: Any) -> Any:
        self._replayed = batch, replay
        if self.star_select is None:
            return super()._replay_forward(batch, replay, return_fields)  # type: ignore[misc]
        pipeline = self.adapter.pipeline  # type: ignore[attr-defined]
        module = pipeline.transformer
        selection = self.star_select(batch, pipeline).to(next(module.parameters()).device)
        with record_maps(module, selection, passes=1, **self.star_capture) as recorded:
            output = super()._replay_forward(batch, replay, return_fields)  # type: ignore[misc]
        if not recorded.maps:
            raise RuntimeError("no maps were captured: the adapter did not run pipeline.transformer in this step")
        self._maps = recorded.maps[0].sum(dim=1)
        return output

    def _require_policy_log_prob(self, output: Any, step_index: int, batch_size: int) -> Tensor:
        log_prob = super()._require_policy_log_prob(output, step_index, batch_size)  # type: ignore[misc]
        assert self._replayed is not None
        batch, replay = self._replayed
        old = self._require_replay_log_prob(replay, step_index)  # type: ignore[attr-defined]
        if self.star_select is None:
            self._compare(log_prob, old, step_index)
        if self.star_select is None or self._guards:
            return log_prob
        old_means = self.adapter.get_replay_callback(batch, step_index, "next_latents_mean")  # type: ignore[attr-defined]
        return old + self._log_ratio(output, replay, old_means, step_index, guard=False)

    def _log_ratio(self, output: Any, replay: Any, old_means: Any, step_index: int, *, guard: bool) -> Tensor:
        """The log-ratio of each sample, [B]: weighted in the first component of the latent, plain in others."""
        adapter = self.adapter  # type: ignore[attr-defined]
        names = adapter.trajectory_component_order
        if getattr(replay.state, "active_masks", None) is not None:
            raise ValueError("weights need latents without active_masks, got masks of " + ", ".join(names))
        terms = {}
        for name in names:
            dynamics = adapter.scheduler_group[name].dynamics_type
            if dynamics not in SAMPLERS:
                raise ValueError(f"dynamics_type of {name} must be {', '.join(SAMPLERS)} for weights, got {dynamics!r}")
            mean, prev_sample, old = (
                state.components[name] for state in (output.next_state_mean, replay.next_state, old_means)
            )
            scale = output.std_dev_t[name].reshape(-1).float(), torch.sqrt(-output.dt[name].reshape(-1).float())
            options: dict[str, Any] = {"sde_type": SAMPLERS[dynamics], "guard": guard, "old_prev_sample_mean": old}
            self._check.add(
                output.component_log_probs[name], mean, prev_sample, *scale, sde_type=SAMPLERS[dynamics],
                name=f"component_log_probs[{name!r}] ({dynamics})",
            )  # fmt: skip
            if name == names[0]:
                maps = self._maps
                assert maps is not None
                strength, cap = self.star_strength, self.star_cap
                options["weights"] = allocate(maps, layout=map_layout(maps), strength=strength, cap=cap)
                transition = mean_transition(*scale, sde_type=SAMPLERS[dynamics])
                with torch.no_grad():
                    new_log_prob, old_log_prob = (log_prob_of_means(m, prev_sample, transition) for m in (mean, old))
                self._compare(new_log_prob, old_log_prob, step_index)
            else:
                mean, prev_sample, options["old_prev_sample_mean"] = (
                    t.flatten(1)[:, None] for t in (mean, prev_sample, old)
                )
            terms[name] = ratio_of_means(mean, prev_sample, *scale, **options).clamp(min=_SMALLEST).log()
        if len(names) == 1:
            return terms[names[0]]
        return adapter.reduce_latent_values(
            terms, active_numel=adapter.get_state_active_numel(replay.state), state=replay.state
        )

    def _compare(self, log_prob: Tensor, other: Tensor, step_index: int) -> None:
        for name, value in log_prob_agreement(log_prob, other).metrics(f"log_prob_diff/step_{step_index}").items():
            self._agreements.setdefault(name, []).append(value)

    def _apply_optimizer_step(self, loss_info: Any) -> Any:
        for name, values in self._agreements.items():
            loss_info[name].extend(values)
        self._agreements = {}
        return super()._apply_optimizer_step(loss_info)  # type: ignore[misc]


class _StarGuard(_Star):
    """GRPO-Guard clips a normalised ratio, which its trainer computes in a method."""

    def _guard_ratio(self, output: Any, replay: Any, old_state_mean: Any, step_index: int = 0) -> Tensor:
        ratio = super()._guard_ratio(output, replay, old_state_mean, step_index)  # type: ignore[misc]
        if self.star_select is None:
            return ratio
        return self._log_ratio(output, replay, old_state_mean, step_index, guard=True).exp()


def star(trainer: type[Any]) -> type[Any]:
    """A subclass of Flow-Factory's ``GRPOTrainer`` or ``GRPOGuardTrainer`` whose ratios have weights.

    Its attribute ``star_select`` is None: without it the subclass computes Flow-Factory's own numbers.

    Raises:
        ImportError: the trainer lacks a method that newer versions of Flow-Factory have.
    """
    missing = [name for name in HOOKS if not hasattr(trainer, name)]
    if missing:
        raise ImportError(f"trainer must be of {MINIMUM}, got one without {', '.join(missing)}")
    part = _StarGuard if hasattr(trainer, "_guard_ratio") else _Star
    name = f"Star{trainer.__name__}"
    return type(name, (part, trainer), {"__doc__": trainer.__doc__, "__module__": __name__, "__qualname__": name})


def register(
    select: Select | None = None, *, strength: float = 1.0, cap: float | None = None, **capture: Any
) -> dict[str, type[Any]]:
    """Replaces Flow-Factory's trainers "grpo" and "grpo-guard"; call it before ``flow_factory.train.main``.

    The names stay the same, because Flow-Factory chooses the training arguments by the name of the trainer.

    Args:
        select: ``select(batch, pipeline)`` returns the selected tokens of the batch's prompts. The maps are those of
            the first forward pass of a step, by the trained model, detached. None: Flow-Factory's own numbers.
        strength, cap: of :func:`star_kernels.allocate`.
        capture: options of :func:`star_kernels.capture.capture_maps`.

    Returns:
        The subclasses by the names of the trainers.

    Raises:
        ImportError: Flow-Factory is not installed, or too old.
    """
    try:
        trainers, registry = importlib.import_module(TRAINERS), importlib.import_module(REGISTRY)
    except ImportError as error:
        raise ImportError(f"register() requires {MINIMUM}: {error}") from error
    found = {}
    for name, base in CLASSES.items():
        made = found[name] = star(getattr(trainers, base))
        made.star_select = None if select is None else staticmethod(select)
        made.star_strength, made.star_cap, made.star_capture = strength, cap, capture
        globals()[made.__name__] = made  # the registry keeps a path
        registry.register_trainer(name)(made)
    return found
