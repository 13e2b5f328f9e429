"""A stand-in for Flow-Factory's GRPO trainers: the methods that a replayed step goes through, by their documentation.

One step of one batch; the latent has one component, or two as in LTX-2.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels.integrations.flow_factory import REGISTRY, TRAINERS


@dataclass
class State:
    components: dict[str, Tensor]
    active_masks: dict[str, Tensor] | None = None


def log_prob(prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, std).log_prob(prev).flatten(1).mean(dim=1)


class Adapter:
    """A pipeline and its schedulers; the joint log-probability is the mean over all numbers of all components."""

    def __init__(self, pipeline: Any, velocity: Any, names: tuple[str, ...], dynamics: str) -> None:
        self.pipeline, self.velocity = pipeline, velocity
        self.trajectory_component_order = names
        self.scheduler_group = {name: SimpleNamespace(dynamics_type=dynamics) for name in names}

    def forward_state(self, state: State, next_state: State) -> Any:
        means, std_dev_t, dt, each = {}, {}, {}, {}
        for name, sample in state.components.items():
            ones = [1] * (sample.ndim - 1)
            means[name] = 0.9 * sample + 0.1 * self.velocity(name, sample)
            std_dev_t[name] = torch.tensor([0.6, 0.5]).view(-1, *ones)
            dt[name] = torch.tensor([-0.1, -0.2]).view(-1, *ones)
            std = std_dev_t[name]
            if self.scheduler_group[name].dynamics_type == "CPS":
                each[name] = -(next_state.components[name] - means[name]).square().flatten(1).mean(dim=1)
            else:
                std = std_dev_t[name] * torch.sqrt(-dt[name])
                each[name] = log_prob(next_state.components[name], means[name], std)
        return SimpleNamespace(
            next_state_mean=State(means), std_dev_t=std_dev_t, dt=dt, component_log_probs=each,
            log_prob=self.reduce_latent_values(each, active_numel=self.get_state_active_numel(state), state=state),
        )  # fmt: skip

    def get_state_active_numel(self, state: State) -> dict[str, int]:
        return {name: value[0].numel() for name, value in state.components.items()}

    def reduce_latent_values(self, values: dict[str, Tensor], *, active_numel: dict[str, int], state: State) -> Tensor:
        total = sum(active_numel.values())
        return sum(values[name] * (active_numel[name] / total) for name in values)  # type: ignore[return-value]

    def get_replay_callback(self, batch: Any, step_index: int, field: str) -> State:
        return batch[field]


class GRPOTrainer:
    def __init__(self, **arguments: Any) -> None:
        vars(self).update(arguments)
        self.logged: dict[str, list[Tensor]] = {}

    def generate_samples(self, **options: Any) -> dict[str, Any]:
        return options

    def _canonical_return_fields(self, fields: Any) -> tuple[str, ...]:
        return tuple(sorted(set(fields)))

    def _replay_forward(self, batch: Any, replay: Any, return_fields: Any) -> Any:
        return self.adapter.forward_state(replay.state, replay.next_state)  # type: ignore[attr-defined]

    def _require_replay_log_prob(self, replay: Any, step_index: int) -> Tensor:
        return replay.log_prob

    def _require_policy_log_prob(self, output: Any, step_index: int, batch_size: int) -> Tensor:
        return output.log_prob

    def _apply_optimizer_step(self, loss_info: Any) -> Any:
        self.logged = dict(loss_info)
        return defaultdict(list)

    def ratio(self, batch: Any, replay: Any) -> Tensor:
        """The part of ``optimize`` before the clip."""
        output = self._replay_forward(batch, replay, self._canonical_return_fields({"log_prob", "dt"}))
        ratio = torch.exp(self._require_policy_log_prob(output, 2, 2) - self._require_replay_log_prob(replay, 2))
        self._apply_optimizer_step(defaultdict(list, ratio=[ratio.detach()]))
        return ratio


class GRPOGuardTrainer(GRPOTrainer):
    def _guard_ratio(self, output: Any, replay: Any, old_state_mean: Any, step_index: int = 0) -> Tensor:
        self._require_policy_log_prob(output, step_index, 2)
        terms = {}
        for name in self.adapter.trajectory_component_order:  # type: ignore[attr-defined]
            scale = (output.std_dev_t[name] * torch.sqrt(-output.dt[name])).flatten()
            change = output.component_log_probs[name] - replay.component_log_probs[name]
            squares = output.next_state_mean.components[name] - old_state_mean.components[name]
            terms[name] = change * scale + squares.square().flatten(1).mean(dim=1) / (2 * scale)
        numel = self.adapter.get_state_active_numel(replay.state)  # type: ignore[attr-defined]
        return self.adapter.reduce_latent_values(terms, active_numel=numel, state=replay.state).exp()  # type: ignore[attr-defined]

    def ratio(self, batch: Any, replay: Any) -> Tensor:
        output = self._replay_forward(batch, replay, self._canonical_return_fields({"log_prob", "dt"}))
        ratio = self._guard_ratio(output, replay, batch["next_latents_mean"], 2)
        self._apply_optimizer_step(defaultdict(list, ratio=[ratio.detach()]))
        return ratio


@pytest.fixture
def flow_factory(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Installs the stand-in for Flow-Factory for one test; returns its registry."""
    registry: dict[str, type] = {}

    def register_trainer(name: str) -> Any:
        return lambda made: registry.setdefault(name, made)

    modules = {TRAINERS: ModuleType(TRAINERS), REGISTRY: ModuleType(REGISTRY)}
    vars(modules[TRAINERS]).update(GRPOTrainer=GRPOTrainer, GRPOGuardTrainer=GRPOGuardTrainer)
    vars(modules[REGISTRY]).update(register_trainer=register_trainer)
    for name, module in modules.items():
        parts = name.split(".")
        for n in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:n]), ModuleType(".".join(parts[:n])))
        monkeypatch.setitem(sys.modules, name, module)
    return registry
