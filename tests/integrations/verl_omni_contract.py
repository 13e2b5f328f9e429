"""A stand-in for the parts of VeRL-Omni around a diffusion loss: registry, losses, engines and loss dispatch.

Its signatures are those that tools/clients/verl_omni_interface.py has for the real code (test_verl_omni_interface.py);
``python -m tools.check_clients`` runs the real code. The micro-batch and the loss's data are plain dictionaries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from flow_grpo_formulas import Rollout, written_step
from torch import Tensor

from star_kernels.integrations.verl_omni import ALGORITHMS, ENGINES
from tools.clients.verl_omni_interface import INTERFACE

KEYS = INTERFACE["verl_omni/trainer/diffusion/diffusion_algos.py"]


@dataclass
class DiffusionLossResult:
    loss: Tensor
    metrics: dict[str, Any]
    add_loss_metric: bool = False


class DiffusionLossFn:
    required_model_output_keys: tuple[str, ...] = ()
    required_data_keys: tuple[str, ...] = ()

    def validate_inputs(self, *, loss_name: str, model_output: dict, data: dict) -> None:
        missing = [key for key in self.required_model_output_keys if key not in model_output]
        if missing:
            raise KeyError(f"{loss_name}: Missing model_output keys: {missing}.")
        missing = [key for key in self.required_data_keys if key not in data]
        if missing:
            raise KeyError(f"{loss_name}: Missing data keys: {missing}.")

    @staticmethod
    def prepare_actor_batch(batch: Any, reward_tensor: Any, config: Any) -> Any:
        return batch


class FlowGRPOLoss(DiffusionLossFn):
    required_model_output_keys = KEYS["FlowGRPOLoss.required_model_output_keys"]
    required_data_keys = KEYS["FlowGRPOLoss.required_data_keys"]

    @classmethod
    def compute_loss(
        cls, *, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, config: Any,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict]:  # fmt: skip
        log_ratio = log_prob - old_log_prob
        return clipped(log_ratio, log_ratio.exp(), advantages, config.diffusion_loss, rollout_is_weights)

    def __call__(self, *, config: Any, model_output: dict, data: dict) -> DiffusionLossResult:
        arguments = {"config": config, "rollout_is_weights": data.get("rollout_is_weights")}
        return DiffusionLossResult(
            *self.compute_loss(
                old_log_prob=data["old_log_probs"],
                log_prob=model_output["log_probs"],
                advantages=data["advantages"],
                **arguments,
            )
        )


class GRPOGuardLoss(DiffusionLossFn):
    required_model_output_keys = KEYS["GRPOGuardLoss.required_model_output_keys"]
    required_data_keys = KEYS["GRPOGuardLoss.required_data_keys"]

    @classmethod
    def compute_loss(
        cls, *, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, config: Any, old_prev_sample_mean: Tensor,
        prev_sample_mean: Tensor, std_dev_t: Tensor, sqrt_dt: Tensor, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict]:  # fmt: skip
        scale = sqrt_dt.mean() * std_dev_t.mean()
        drift = (prev_sample_mean - old_prev_sample_mean).square().flatten(1).mean(dim=1)
        log_ratio = log_prob - old_log_prob
        ratio = ((log_ratio + drift / (2 * scale**2)) * scale).exp()
        loss, metrics = clipped(log_ratio, ratio, advantages, config.diffusion_loss, rollout_is_weights)
        return loss / sqrt_dt.mean() ** 2, metrics

    def __call__(self, *, config: Any, model_output: dict, data: dict) -> DiffusionLossResult:
        means = {key: model_output[key] for key in ("prev_sample_mean", "std_dev_t", "sqrt_dt")}
        return DiffusionLossResult(
            *self.compute_loss(
                old_log_prob=data["old_log_probs"],
                log_prob=model_output["log_probs"],
                advantages=data["advantages"],
                config=config,
                old_prev_sample_mean=data["old_prev_sample_mean"],
                rollout_is_weights=data.get("rollout_is_weights"),
                **means,
            )
        )


class FlowDPPOLoss(DiffusionLossFn):
    required_model_output_keys = KEYS["FlowDPPOLoss.required_model_output_keys"]
    required_data_keys = KEYS["FlowDPPOLoss.required_data_keys"]

    @classmethod
    def compute_loss(
        cls, *, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, config: Any, old_prev_sample_mean: Tensor,
        prev_sample_mean: Tensor, std_dev_t: Tensor, sqrt_dt: Tensor, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict]:  # fmt: skip
        settings, ratio = config.diffusion_loss, (log_prob - old_log_prob).exp()
        kl = (prev_sample_mean - old_prev_sample_mean).square().flatten(1).mean(dim=1) / 2
        if settings.add_kl_coefficient:
            kl = kl / (std_dev_t.flatten() * sqrt_dt.flatten()) ** 2
        high = kl >= settings.kl_mask_threshold
        positive, negative = (high & (ratio > 1) & (advantages > 0)), (high & (ratio < 1) & (advantages < 0))
        each = torch.where(positive | negative, 0.0, -advantages * ratio)
        each = each if rollout_is_weights is None else each * rollout_is_weights
        metrics = {
            "ppo_kl": (old_log_prob - log_prob).mean(),
            "approx_kl": 0.5 * (log_prob - old_log_prob).square().mean(),
            "ratio_mean": ratio.mean(),
            "ratio_std": ratio.std(unbiased=False),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "kl_new_old_mean": kl.mean(),
            "kl_new_old_max": kl.max(),
            "kl_mask_fraction": high.float().mean(),
            "pos_rm_fraction": positive.float().mean(),
            "neg_rm_fraction": negative.float().mean(),
            "masked_fraction": (positive | negative).float().mean(),
            "unmasked_fraction": 1 - (positive | negative).float().mean(),
        }
        return each.mean(), {f"actor/{name}": value.item() for name, value in metrics.items()}

    __call__ = GRPOGuardLoss.__call__


class DPOLoss(FlowGRPOLoss):
    """Stands for a loss that does not support weights."""


class DiffusionNFTLoss(DiffusionLossFn):
    required_model_output_keys = KEYS["DiffusionNFTLoss.required_model_output_keys"]
    required_data_keys = KEYS["DiffusionNFTLoss.required_data_keys"]

    @classmethod
    def compute_loss(
        cls, *, forward_prediction: Tensor, old_prediction: Tensor, ref_forward_prediction: Tensor, x0: Tensor,
        xt: Tensor, t_expanded: Tensor, reward_prob: Tensor, config: Any,
    ) -> tuple[Tensor, dict]:  # fmt: skip
        settings, losses = config.diffusion_loss, []
        for sign in (1, -1):
            error = xt - t_expanded * (
                old_prediction + sign * settings.mix_beta * (forward_prediction - old_prediction)
            )
            error = (error - x0).flatten(1)
            losses.append(error.square().mean(dim=1) / error.detach().abs().mean(dim=1).clip(min=1e-5))
        each = (reward_prob * losses[0] + (1 - reward_prob) * losses[1]) / settings.mix_beta
        penalty = (forward_prediction - ref_forward_prediction).square().mean()
        loss = (each * settings.adv_clip_max).mean() + settings.ref_kl_coef * penalty
        return loss, {"actor/total_loss": loss.item()}

    def __call__(self, *, config: Any, model_output: dict, data: dict) -> DiffusionLossResult:
        found = self.compute_loss(**model_output, reward_prob=data["reward_prob"], config=config)
        return DiffusionLossResult(*found)


def clipped(
    log_ratio: Tensor, ratio: Tensor, advantages: Tensor, settings: Any, factor: Tensor | None
) -> tuple[Tensor, dict]:
    advantages = advantages.clamp(-settings.adv_clip_max, settings.adv_clip_max)
    bounded = ratio.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio)
    each = torch.maximum(-advantages * ratio, -advantages * bounded)
    each = each if factor is None else each * factor
    above, below = ratio - 1 > settings.clip_ratio, 1 - ratio > settings.clip_ratio
    metrics = {
        "ppo_kl": -log_ratio.mean(),
        "pg_clipfrac": (above | below).float().mean(),
        "pg_clipfrac_higher": above.float().mean(),
        "pg_clipfrac_lower": below.float().mean(),
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std(),
    }
    return each.mean(), {f"actor/{name}": value.item() for name, value in metrics.items()}


@dataclass
class World:
    """The state of VeRL-Omni in a process: registered losses, and the engine classes."""

    registry: dict[str, Any]
    engine: type[Any]
    engines: ModuleType


def make_engines() -> dict[str, type[Any]]:
    class PPODiffusersFSDPEngine:
        """Runs one step of a micro-batch; ``module`` is a function from latents to velocities."""

        def __init__(
            self, module: Callable[[Tensor], Tensor], scheduler: Any, sde_type: str, noise_level: float
        ) -> None:
            self.module, self.scheduler = module, scheduler
            self.sampler = {"sde_type": sde_type, "noise_level": noise_level}
            self.model_config = SimpleNamespace(algo=SimpleNamespace(**self.sampler), attn_backend="native")

        def forward_step(
            self, micro_batch: dict, loss_function: Any, forward_only: bool, step: int
        ) -> tuple[Any, dict]:
            latents, timesteps = micro_batch["all_latents"], micro_batch["all_timesteps"]
            x, following = latents[:, step], micro_batch.get("all_next_latents")
            prev = latents[:, step + 1] if following is None else following[:, step]
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

    class NFTDiffusersFSDPEngine:
        """Passes the outputs that a micro-batch has for the step."""

        def forward_step(
            self, micro_batch: dict, loss_function: Any, forward_only: bool, step: int
        ) -> tuple[Any, dict]:
            data = {"reward_prob": micro_batch["reward_prob"][:, step]}
            loss, metrics = loss_function(model_output=micro_batch["outputs"], data=data, dp_group=None)
            return loss, {"metrics": metrics}

    class DPODiffusersFSDPEngine:
        def forward_step(
            self, micro_batch: dict, loss_function: Any, forward_only: bool, step: int | None
        ) -> tuple[Any, dict]:
            return loss_function(model_output={}, data={}, dp_group=None), {}

    made = (PPODiffusersFSDPEngine, NFTDiffusersFSDPEngine, DPODiffusersFSDPEngine)
    for engine in made:
        engine.__module__ = ENGINES
    return {engine.__name__: engine for engine in made}


@pytest.fixture
def verl_omni(monkeypatch: pytest.MonkeyPatch) -> World:
    """Installs the stand-in for VeRL-Omni for one test."""
    algorithms, engines = ModuleType(ALGORITHMS), ModuleType(ENGINES)
    registry: dict[str, Any] = {}

    def register_diffusion_loss(name: str) -> Callable[[type], type]:
        def decorator(cls: type) -> type:
            registry[name] = cls()
            return cls

        return decorator

    losses = {"dance_grpo": FlowGRPOLoss, "grpo_guard": GRPOGuardLoss, "diffusion_nft": DiffusionNFTLoss}
    for name, loss in {"flow_grpo": FlowGRPOLoss, "flow_dppo": FlowDPPOLoss, "dpo": DPOLoss, **losses}.items():
        register_diffusion_loss(name)(loss)
    vars(algorithms).update(DIFFUSION_LOSS_REGISTRY=registry, register_diffusion_loss=register_diffusion_loss)
    vars(engines).update(make_engines())
    for module in (algorithms, engines):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parts = module.__name__.split(".")
        for n in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:n]), ModuleType(".".join(parts[:n])))
    return World(registry, engines.PPODiffusersFSDPEngine, engines)


def actor_config(loss_mode: str, clip_ratio: float = 0.05) -> SimpleNamespace:
    settings = {"clip_ratio": clip_ratio, "adv_clip_max": 5.0, "mix_beta": 0.5, "ref_kl_coef": 0.1}
    settings |= {"kl_mask_threshold": 1e-3, "add_kl_coefficient": True}
    return SimpleNamespace(diffusion_loss=SimpleNamespace(loss_mode=loss_mode, adaptive_weight_min=1e-5, **settings))


def dispatch(world: World, config: Any) -> Callable[..., tuple[Tensor, dict]]:
    """The loss function of the engine: looks up the loss, validates its inputs, and calls it."""

    def diffusion_loss(*, model_output: dict, data: dict, dp_group: Any) -> tuple[Tensor, dict]:
        name = config.diffusion_loss.loss_mode
        loss = world.registry[name]
        loss.validate_inputs(loss_name=name, model_output=model_output, data=data)
        result = loss(config=config, model_output=model_output, data=data)
        assert result.add_loss_metric is False
        return result.loss, result.metrics

    return diffusion_loss


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
