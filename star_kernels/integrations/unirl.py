"""STAR in UniRL (github.com/Tencent-Hunyuan/UniRL, 0.2.0 and later): its algorithms with weights for the positions.

``StarFlowGRPO`` and ``StarFlowDPPO`` are subclasses of UniRL's classes, made when they are first used. Everything
except the log-probabilities of a step is UniRL's: the loss, its clip or mask, the KL penalty, metrics, anchors and the
backward pass. Without ``select`` they return UniRL's own numbers. With it the log-probabilities of a sample are those
whose difference from the old ones is ``mean_p W_p d_p``, where d is the channel-mean log-ratio at a position.
docs/unirl.md shows how to use them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from star_kernels.integrations.agreement import log_prob_agreement
from star_kernels.integrations.means import log_prob_of_means, mean_transition, ratio_of_means
from star_kernels.integrations.record import record_maps
from star_kernels.integrations.sampler_check import SamplerCheck
from star_kernels.selection import TokenSelection

__all__ = ["prompts_of", "star"]

ALGORITHMS = {"StarFlowGRPO": "flowgrpo.FlowGRPO", "StarFlowDPPO": "flowdppo.FlowDPPO"}
SAMPLERS = {"flow": "sde", "dance": "sde", "cps": "cps"}  # canonical_name of a strategy: sampler of mean_transition
_SMALLEST = torch.finfo(torch.float32).tiny

Select = Callable[[Any], TokenSelection]


def prompts_of(part: Any) -> list[str]:
    """The prompts of a part: "prompt" of the metadata of each sample, which its row of the data set provides.

    Raises:
        KeyError: the metadata of a sample has no "prompt".
    """
    rows = list(part.metadata or [])
    missing = [i for i, row in enumerate(rows) if "prompt" not in (row or {})]
    if len(rows) != part.batch_size or missing:
        raise KeyError(
            'the samples need metadata with "prompt": rows of the data set must be '
            '{"prompt": ..., "metadata": {"prompt": ...}}, because UniRL drops the text before training'
        )
    return [row["prompt"] for row in rows]


class _Replay:
    """A stage whose replay with gradients returns weighted log-probabilities; all else is the stage's."""

    def __init__(self, stage: Any, check: SamplerCheck, *, weighted: bool) -> None:
        self._stage, self._check, self._weighted = stage, check, weighted
        self.metrics: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def replay(self, conditions: Any, *, segment: Any, params: Any, step_indices: list[int] | None = None) -> Any:
        result = self._stage.replay(conditions, segment=segment, params=params, step_indices=step_indices)
        if not torch.is_grad_enabled():  # the reference model
            return result
        steps = segment.sde_indices.tolist() if step_indices is None else step_indices
        old = _of_steps(segment, "sde_logp", steps).to(result.log_probs)
        if not self._weighted:
            self._compare("log_prob_diff", result.log_probs, old, steps)
            return result
        if result.prev_sample_means is None or segment.loss_mask is None or segment.sde_means is None:
            raise RuntimeError(
                "weights need prev_sample_means of stage.replay(), and segment.sde_means and segment.loss_mask of "
                "prepare_part: the train stack must call prepare_part before the updates"
            )
        log_ratio = self._log_ratio(result, segment, params, steps)
        return replace(result, log_probs=old + log_ratio.to(old))

    def _log_ratio(self, result: Any, segment: Any, params: Any, steps: list[int]) -> Tensor:
        """``mean_p W_p d_p`` of each sample and step, [B, Steps], with the gradient of the means."""
        means = result.prev_sample_means.float()
        count = len(means)
        strategy = getattr(self._stage.strategy, "canonical_name", type(self._stage.strategy).__name__)
        if strategy not in SAMPLERS:
            raise ValueError(
                f"stage.strategy must be one of {', '.join(SAMPLERS)} for weights, got {strategy!r}, whose "
                "log-probability is not known by location"
            )
        sampler = SAMPLERS[strategy]
        base = importlib.import_module("unirl.algorithms.base")
        std = base._transition_sigma(
            self._stage, segment=segment, target_steps=steps, eta=float(params.eta), device=means.device
        )
        scale = std.reshape(-1).repeat(count), torch.ones_like(std).repeat(count)  # std_dev_t, sqrt_dt of each row
        latents = torch.stack([segment.latents_at(i + 1) for i in steps], dim=1).to(means)
        rows = [t.flatten(0, 1) for t in (means, latents, _of_steps(segment, "sde_means", steps).to(means))]
        mean, prev_sample, old_mean = rows
        self._check.add(
            result.log_probs.reshape(-1), mean, prev_sample, *scale, sde_type=sampler, name=f"stage.replay ({strategy})"
        )
        weights = _of_steps(segment, "loss_mask", steps).to(means).flatten(0, 1)
        ratio = ratio_of_means(
            mean, prev_sample, *scale, sde_type=sampler, old_prev_sample_mean=old_mean, weights=weights
        )
        transition = mean_transition(*scale, sde_type=sampler)
        with torch.no_grad():
            new, old = (
                log_prob_of_means(m, prev_sample, transition).unflatten(0, (count, -1)) for m in (mean, old_mean)
            )
        self._compare("log_prob_diff", new, old, steps)
        return ratio.clamp(min=_SMALLEST).log().view(count, -1)

    def _compare(self, name: str, log_prob: Tensor, other: Tensor, steps: list[int]) -> None:
        self.metrics |= _differences(name, log_prob, other, steps)


class _Star:
    """The part of the subclasses that is the same for every algorithm."""

    def __init__(
        self,
        *,
        select: Select | None = None,
        strength: float = 1.0,
        over: str = "step",
        cap: float | None = None,
        batch_size: int = 1,
        capture: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        """
        Args:
            select: returns the selected tokens of a part (a slice of the samples), on any device; see
                :func:`prompts_of`. None is UniRL's algorithm.
            strength, over, cap: of :func:`star_kernels.allocate`.
            batch_size: samples in a forward pass that captures maps and computes the old log-probabilities; the
                ``micro_batch_size`` of training, so that the ratio of a model that has not changed is 1.
            capture: options of :func:`star_kernels.capture.capture_maps`.
            arguments: of UniRL's class.
        """
        super().__init__(**arguments)
        self.select, self.batch_size, self.capture = select, batch_size, dict(capture or {})
        self.allocation = {"strength": strength, "over": over, "cap": cap}
        self._check = SamplerCheck()
        self._rollout_diff: dict[str, float] = {}
        if select is None:
            return
        if self.old_logp_source != "replay":  # type: ignore[attr-defined]
            raise ValueError(
                "old_logp_source must be 'replay' with weights, because the rollout has no log-probabilities of "
                f"locations, got {self.old_logp_source!r}"  # type: ignore[attr-defined]
            )
        if getattr(self.stage, "batch_replay_steps", False):  # type: ignore[has-type]
            raise ValueError("batch_replay_steps must be False with weights: maps are captured step by step, got True")

    @property
    def recomputes_anchor(self) -> bool:
        """False with weights: :meth:`prepare_part` computes the anchors."""
        return False if self.select is not None else bool(super().recomputes_anchor)  # type: ignore[misc]

    def prepare_segment(self, *, conditions: Any, segment: Any) -> None:
        if self.select is None:
            super().prepare_segment(conditions=conditions, segment=segment)  # type: ignore[misc]

    def prepare_part(self, part: Any) -> Any:
        """Old log-probabilities, means and weights of all samples, from one pass of the model before the updates."""
        part = super().prepare_part(part)  # type: ignore[misc]
        segment = part.segment
        if self.select is None or segment is None or segment.sde_indices is None or not len(segment.sde_indices):
            return part
        if segment.loss_mask is not None:
            raise ValueError("segment.loss_mask must be None: the weights are stored there")
        steps = [int(i) for i in segment.sde_indices.tolist()]
        found: dict[str, list[Tensor]] = {"sde_logp": [], "sde_means": [], "loss_mask": []}
        for start in range(0, part.batch_size, self.batch_size):
            rows = part.slice(start, min(start + self.batch_size, part.batch_size))
            for name, value in self._anchors(rows, steps).items():
                found[name].append(value)
        anchors = {name: torch.cat(values) for name, values in found.items()}
        if segment.sde_logp is not None:
            other = _of_steps(segment, "sde_logp", steps).to(anchors["sde_logp"])
            self._rollout_diff = _differences("rollout_log_prob_diff", anchors["sde_logp"], other, steps)
        for name, value in anchors.items():
            setattr(segment, name, value)
        return part

    def _anchors(self, rows: Any, steps: list[int]) -> dict[str, Tensor]:
        module = self.stage.trainable_module()
        device = next(module.parameters()).device
        base = importlib.import_module("unirl.algorithms.base")
        conditions = base.typed_conditions(rows.conditions, self.conditions_cls)  # type: ignore[attr-defined]
        assert self.select is not None
        with torch.no_grad(), record_maps(module, self.select(rows).to(device), **self.capture) as recorded:
            result = self.stage.replay(
                conditions,
                segment=rows.segment,
                params=self.params,  # type: ignore[attr-defined]
                step_indices=steps,
            )
        if len(recorded.maps) != len(steps):
            raise ValueError(
                f"stage.replay must run the captured model once for each step, got {len(recorded.maps)} passes for "
                f"{len(steps)} steps"
            )
        if result.prev_sample_means is None:
            raise ValueError("stage.replay must return prev_sample_means, got None")
        found = {"sde_logp": result.log_probs, "sde_means": result.prev_sample_means}
        found["loss_mask"] = recorded.weights(**self.allocation)  # type: ignore[arg-type]
        return {name: value.detach().cpu() for name, value in found.items()}

    def compute_loss_and_backward(self, *, segment: Any, **arguments: Any) -> Any:
        if segment.sde_logp is None:
            return super().compute_loss_and_backward(segment=segment, **arguments)  # type: ignore[misc]
        stage = self.stage  # type: ignore[has-type]
        replayed = _Replay(stage, self._check, weighted=self.select is not None)
        self.stage = replayed
        try:
            result = super().compute_loss_and_backward(segment=segment, **arguments)  # type: ignore[misc]
        finally:
            self.stage = stage
        return replace(result, metrics={**result.metrics, **self._rollout_diff, **replayed.metrics})


def star(algorithm: type[Any]) -> type[Any]:
    """A subclass of an algorithm of UniRL whose log-probabilities have weights.

    Args:
        algorithm: a ``StageAlgorithm`` that compares log-probabilities of ``stage.replay`` with ``segment.sde_logp``
            and has ``old_logp_source``, such as ``FlowGRPO`` and ``FlowDPPO``.

    Raises:
        TypeError: the algorithm is of a version of UniRL before 0.2.0, which has no ``prepare_part``.
    """
    if not hasattr(algorithm, "prepare_part"):
        raise TypeError(f"algorithm must be of UniRL 0.2.0 or later, which has prepare_part, got {algorithm.__name__}")
    name = f"Star{algorithm.__name__}"
    doc = f"UniRL's {algorithm.__name__} with weights for the positions.\n{_Star.__init__.__doc__}"
    return type(name, (_Star, algorithm), {"__doc__": doc, "__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> Any:
    if name not in ALGORITHMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, algorithm = ALGORITHMS[name].partition(".")
    try:
        found = importlib.import_module(f"unirl.algorithms.{module}")
    except ImportError as error:
        raise ImportError(f"{name} requires UniRL (unirl.algorithms.{module}): {error}") from error
    made = globals()[name] = star(getattr(found, algorithm))
    return made


def _of_steps(segment: Any, field: str, steps: list[int]) -> Tensor:
    """The entries of a field of the segment for some steps, [B, Steps, ...]."""
    base = importlib.import_module("unirl.algorithms.base")
    return base.gather_sde_field(getattr(segment, field), segment.sde_indices, steps, field_name=field)


def _differences(name: str, log_prob: Tensor, other: Tensor, steps: list[int]) -> dict[str, float]:
    found = log_prob_agreement(log_prob, other, by_step=True)
    values = {kind: getattr(found, kind).tolist() for kind in ("mean", "max")}
    return {f"{name}/step_{step}/{kind}": values[kind][i] for i, step in enumerate(steps) for kind in values}
