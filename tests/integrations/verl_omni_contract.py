"""A stand-in for the parts of VeRL-Omni around a diffusion loss: registry, engine, loss dispatch and two losses.

Written from its documented interface. The micro-batch and the loss's data are plain dictionaries.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from flow_grpo_formulas import Rollout, written_step
from torch import Tensor

from star_kernels.integrations.verl_omni import ALGORITHMS, ENGINES


class DiffusionLossFn(ABC):
    required_model_output_keys: tuple[str, ...] = ()
    required_data_keys: tuple[str, ...] = ()

    def validate_inputs(self, *, loss_name: str, model_output: dict, data: dict) -> None:
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def compute_loss(cls, **arguments: Any) -> tuple[Tensor, dict]: ...

    @abstractmethod
    def __call__(self, *, config: Any, model_output: dict, data: dict) -> Any: ...

    @staticmethod
    def prepare_actor_batch(batch: Any, *_: Any) -> Any:
        return batch


@dataclass
class World:
    """The state of VeRL-Omni in a process: registered losses, and the engine class."""

    registry: dict[str, Any]
    engine: type[Any]


def make_engine() -> type[Any]:
    class PPODiffusersFSDPEngine:
        """Runs one step of a micro-batch; ``module`` is a function from latents to velocities."""

        def __init__(
            self, module: Callable[[Tensor], Tensor], scheduler: Any, sde_type: str, noise_level: float
        ) -> None:
            self.module, self.scheduler = module, scheduler
            self.sampler = {"sde_type": sde_type, "noise_level": noise_level}

        def forward_step(
            self, micro_batch: dict, loss_function: Any, forward_only: bool, step: int
        ) -> tuple[Any, dict]:
            latents, timesteps = micro_batch["all_latents"], micro_batch["all_timesteps"]
            x, prev = latents[:, step], latents[:, step + 1]
            new = written_step(self.scheduler, self.module(x), timesteps[:, step], x, prev=prev, **self.sampler)
            model_output = {
                "log_probs": new.log_prob_mean,
                "prev_sample_mean": new.mean,
                "std_dev_t": new.std_dev_t,
                "sqrt_dt": new.sqrt_dt.flatten(),
            }
            if loss_function is None:
                return None, {"model_output": model_output}
            data = {key: micro_batch[key][:, step] for key in ("old_log_probs", "advantages")}
            for key in ("ref_prev_sample_mean", "old_prev_sample_mean", "rollout_is_weights"):
                if micro_batch.get(key) is not None:
                    data[key] = micro_batch[key][:, step]
            loss, metrics = loss_function(model_output=model_output, data=data, dp_group=None)
            return loss, {"model_output": model_output, "metrics": metrics}

    return PPODiffusersFSDPEngine


@pytest.fixture
def verl_omni(monkeypatch: pytest.MonkeyPatch) -> World:
    """Installs the stand-in for VeRL-Omni for one test."""
    world = World({}, make_engine())

    def register_diffusion_loss(name: str) -> Callable[[type], type]:
        def decorator(cls: type) -> type:
            world.registry[name] = cls()
            return cls

        return decorator

    algorithms, engines = ModuleType(ALGORITHMS), ModuleType(ENGINES)
    vars(algorithms).update(DiffusionLossFn=DiffusionLossFn, register_diffusion_loss=register_diffusion_loss)
    vars(engines).update(PPODiffusersFSDPEngine=world.engine)
    for module in (algorithms, engines):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parts = module.__name__.split(".")
        for n in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:n]), ModuleType(".".join(parts[:n])))
    return world


def actor_config(loss_mode: str, clip_ratio: float = 0.05) -> SimpleNamespace:
    return SimpleNamespace(diffusion_loss=SimpleNamespace(loss_mode=loss_mode, clip_ratio=clip_ratio, adv_clip_max=5.0))


def dispatch(world: World, config: Any) -> Callable[..., tuple[Tensor, dict]]:
    """The loss function of the engine: looks up the loss, validates its inputs, and calls it."""

    def diffusion_loss(*, model_output: dict, data: dict, dp_group: Any) -> tuple[Tensor, dict]:
        name = config.diffusion_loss.loss_mode
        loss = world.registry[name]
        assert "log_probs" in loss.required_model_output_keys  # else rollout correction is skipped
        loss.validate_inputs(loss_name=name, model_output=model_output, data=data)
        result = loss(config=config, model_output=model_output, data=data)
        assert result.add_loss_metric is False
        return result.loss, result.metrics

    return diffusion_loss


def own_loss(model_output: dict, data: dict, clip: float, *, guard: bool) -> Tensor:
    """VeRL-Omni's FlowGRPOLoss and GRPOGuardLoss, according to its documentation."""
    advantages = data["advantages"].clamp(-5, 5)
    log_ratio = model_output["log_probs"] - data["old_log_probs"]
    if guard:
        sqrt_dt = model_output["sqrt_dt"].mean()
        scale = sqrt_dt * model_output["std_dev_t"].mean()
        drift = (model_output["prev_sample_mean"] - data["old_prev_sample_mean"]).square().flatten(1).mean(dim=1)
        log_ratio = (log_ratio + drift / (2 * scale**2)) * scale
    ratio = log_ratio.exp()
    each = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    if "rollout_is_weights" in data:
        each = each * data["rollout_is_weights"]
    return each.mean() / sqrt_dt**2 if guard else each.mean()


def micro_batch(problem: Rollout) -> dict[str, Tensor]:
    """[B, Steps, ...]: a step of NaN, then the step of the problem."""

    def second(t: Tensor) -> Tensor:
        return torch.stack([torch.full_like(t, torch.nan), t], dim=1)

    latents = torch.stack([torch.full_like(problem.sample, torch.nan), problem.sample, problem.old.prev_sample], dim=1)
    return {
        "all_latents": latents,
        "all_timesteps": second(problem.timestep),
        "old_log_probs": second(problem.old.log_prob_mean),
        "advantages": second(problem.advantages),
        "old_prev_sample_mean": second(problem.old.mean),
    }
