"""Each objective: its update equals a hand-written one, strength 0 equals plain and a resumed run the whole one bit for
bit, and settings that it does not use are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from doubled import doubled, rolled_out
from tiers import mostly_exhaustive
from torch import Tensor

from star_trainer import limits
from star_trainer.config import Config
from star_trainer.samples import Step
from star_trainer.trainer import Trainer

OBJECTIVES = ("flow_grpo", "grpo_guard", "flow_dppo", "awm", "nft")
KL = {"kl_coef": 0.1, "kl": "velocity"}


def surrogate(ratio: Tensor, advantages: Tensor, step: Step, change: Tensor, config: Config) -> Tensor:
    """The loss of each sample's ratio; ``change`` is ``(mean - mean_old)^2 / (2 std^2)``, averaged over the sample."""
    train = config.train
    if train.objective == "flow_dppo":
        away = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
        return torch.where((change >= train.kl_mask_threshold) & away, 0.0, -advantages * ratio)
    assert train.clip_range is not None
    clipped = ratio.clamp(1 - train.clip_range, 1 + train.clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def policy_loss(velocity: Tensor, step: Step, advantages: Tensor, sigmas: Tensor, config: Config) -> Tensor:
    """The loss of a step for each sample, from the papers' formulas; the samples' weights act on their locations."""
    train, x, y = config.train, step.sample, step.prev_sample
    sigma, after = float(sigmas[step.number]), float(sigmas[step.number + 1])
    assert step.weights is not None
    weights = torch.nn.functional.interpolate(step.weights[:, None], scale_factor=2)[:, 0]
    advantages = advantages.clamp(-train.advantage_clip, train.advantage_clip)
    if train.objective == "nft":
        assert step.model_output is not None
        good = (advantages / train.advantage_clip + 1) / 2
        total = torch.zeros(())
        for side, share in ((1, good), (-1, 1 - good)):
            implicit = step.model_output + side * train.nft_beta * (velocity - step.model_output)
            error = (x - sigma * implicit) - (x - sigma * y)  # of the image
            size = error.detach().abs().mean(dim=(1, 2, 3)).clamp(min=1e-5)
            total = total + share * (weights * error.square().mean(dim=1)).mean(dim=(1, 2)) / size
        return total * train.advantage_clip / train.nft_beta
    if train.objective == "awm":
        log_prob = -(y - velocity).square().mean(dim=1)
        ratio = (weights * (log_prob - step.log_prob)).mean(dim=(1, 2)).exp()
        return surrogate(ratio, advantages, step, torch.zeros(()), config)
    noise, dt = config.rollout.noise_level * math.sqrt(sigma / (1 - min(sigma, float(sigmas[1])))), after - sigma
    if 1 > sigma > float(sigmas[1]):
        raise AssertionError("the schedule must decrease from 1")
    std = noise * math.sqrt(-dt)

    def mean_of(v: Tensor) -> Tensor:
        return x * (1 + noise**2 / (2 * sigma) * dt) + v * (1 + noise**2 * (1 - sigma) / (2 * sigma)) * dt

    log_prob = (-((y - mean_of(velocity)) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))).mean(dim=1)
    log_ratio, change = log_prob - step.log_prob, torch.zeros(())
    if step.model_output is not None:
        change = ((mean_of(velocity) - mean_of(step.model_output)) ** 2 / (2 * std**2)).mean(dim=1)
    if train.objective == "grpo_guard":
        log_ratio = (log_ratio + change) * std
    ratio = (weights * log_ratio).mean(dim=(1, 2)).exp()
    factor = 1 / (sigma - after) if train.objective == "grpo_guard" else 1.0
    if train.step_weights == "noise":
        each = [
            config.rollout.noise_level * math.sqrt(float(s / (1 - min(s, sigmas[1])) * (s - t)))
            for s, t in pairs(sigmas)
        ]
        factor = each[step.number] * len(each) / sum(each)
    spread = change.mean(dim=(1, 2)) if change.ndim else change
    return factor * surrogate(ratio, advantages, step, spread.detach(), config)


def pairs(sigmas: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(pairwise(sigmas[:-1]))


@pytest.mark.parametrize(
    "train",
    [
        {"objective": "flow_grpo", "clip_range": 0.1, "step_weights": "noise", **KL},
        {"objective": "grpo_guard", "clip_range": 0.1},
        {"objective": "flow_dppo"},
        {"objective": "awm", "clip_range": 0.5, **KL},
        {"objective": "nft", "nft_beta": 0.5, **KL},
    ],
    ids=lambda train: train["objective"],
)
def test_the_update_is_that_of_the_objective(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    monkeypatch: pytest.MonkeyPatch,
    train: dict[str, Any],
) -> None:
    """With weights that changed after the rollout, so that ratios are not one and the policy is not the old one."""
    config = configure(rollout={"steps": 4, "guidance": 1.0}, train={**train, "advantage_clip": 2.0})
    trainer = trainer_of(config)
    batch = doubled(trainer, rolled_out(trainer, config), monkeypatch)
    policy, sigmas = trainer.policy, torch.tensor(trainer.updater.schedule.sigmas, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(3e-3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if policy._reference is not None:
        policy._reference.double()
    advantages = torch.tensor([1.2, -0.7, 9.0, -1.0], dtype=torch.float64)
    total = torch.zeros(())
    for step in batch.steps:
        velocity, reference = (
            policy.velocity(step.sample, 1000 * float(sigmas[step.number]), batch.text, reference=reference)
            for reference in (False, policy._reference is not None)
        )
        loss = policy_loss(velocity, step, advantages, sigmas, config).mean()
        total = total + (loss + config.train.kl_coef * (velocity - reference.detach()).square().mean()) / len(
            batch.steps
        )
    parameters = list(trainer.average.parameters.values())
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    trainer.updater.gradients([batch], advantages)
    size = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    assert size > 1e-5
    for parameter, gradient in zip(parameters, expected, strict=True):
        if parameter.grad is not None and gradient is not None:
            assert float((parameter.grad - gradient).abs().max()) <= 1e-6 * size


@pytest.mark.parametrize("objective", mostly_exhaustive(OBJECTIVES[1:], ["nft"]))
def test_strength_0_is_plain_to_the_last_bit(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path, objective: str
) -> None:
    written = []
    for method in ("plain", "star"):
        config = configure(
            allocation={"method": method, "strength": 0.0},
            train={"objective": objective, "updates": 2},
            output={"folder": str(tmp_path / method)},
        )
        trainer = trainer_of(config)
        before = {n: p.detach().clone() for n, p in trainer.average.parameters.items()}
        trainer.run()
        assert not all(torch.equal(p, before[n]) for n, p in trainer.average.parameters.items())
        written.append((tmp_path / method / "checkpoint-000001" / "weights.safetensors").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("objective", mostly_exhaustive(OBJECTIVES[1:], ["nft"]))
def test_a_resumed_run_is_the_same_run(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path, objective: str
) -> None:
    def run(name: str, epochs: int, *, resume: bool = False) -> Trainer:
        config = configure(
            rollout={"averaged": objective == "nft"},
            train={"objective": objective, "epochs": epochs, "updates": 2},
            output={"folder": str(tmp_path / name), "resume": resume},
        )
        trainer = trainer_of(config)
        trainer.run()
        return trainer

    whole = run("whole", 2)
    run("parts", 1)
    parts = run("parts", 2, resume=True)
    for name, parameter in whole.average.parameters.items():
        assert torch.equal(parameter, parts.average.parameters[name])
        assert torch.equal(whole.average.values[name], parts.average.values[name])


def test_nft_samples_from_the_moving_average_if_asked(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    drawn = []
    for averaged in (False, True):
        trainer = trainer_of(configure(rollout={"averaged": averaged}, train={"objective": "nft"}))
        with torch.no_grad():
            for value in trainer.average.values.values():
                value.mul_(1.1)
        metrics = trainer.train_epoch()
        assert trainer._shown is not None
        drawn.append(trainer._shown[0].steps[0].model_output)
        assert (metrics["loss/deviation"] > 1e-8) is averaged  # of the first optimiser step
    assert not torch.allclose(*drawn)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"train": {"objective": "nft", "clip_range": 0.1}},
            "train.clip_range must be None with train.objective 'nft'",
        ),
        (
            {"train": {"objective": "nft", "ratio": "location"}},
            "train.ratio must be 'sample' with train.objective 'nft'",
        ),
        ({"train": {"objective": "awm", "step_weights": "time"}}, "train.step_weights must be 'uniform' or None with"),
        ({"train": {"objective": "awm"}, "rollout": {"noise_level": 0.5}}, "rollout.noise_level must be 0.7 with"),
        (
            {"train": {"objective": "awm"}, "rollout": {"transition": "flow_cps"}},
            "rollout.transition must be 'flow_sde'",
        ),
        ({"train": {"objective": "flow_dppo", "clip_range": 0.1}}, "train.clip_range must be None with"),
        (
            {"train": {"kl_mask_threshold": 1e-3}},
            "train.kl_mask_threshold must be 1e-05 with train.objective 'flow_grpo'",
        ),
        ({"train": {"nft_beta": 0.1}}, "train.nft_beta must be 1.0 with train.objective 'flow_grpo'"),
        ({"rollout": {"averaged": True}}, "rollout.averaged must be False with train.objective 'flow_grpo'"),
        ({"train": {"objective": "nft", "ema": 0.0}, "rollout": {"averaged": True}}, "train.ema must be above 0"),
        ({"train": {"objective": "nft"}, "allocation": {"credit": "phrase"}}, "allocation.credit must be 'image' with"),
        ({"train": {"objective": "nft", "advantage_clip": math.inf}}, "train.advantage_clip must be finite"),
        ({"train": {"objective": "awm", "kl_coef": 0.1}}, "train.kl must be 'velocity' with train.objective 'awm'"),
        ({"train": {"objective": "awm"}, "rollout": {"shared_noise": True}}, "rollout.shared_noise must be False with"),
        ({"train": {"kl": "velocity"}}, "train.kl_coef must be above 0 with train.kl 'velocity'"),
        ({"reward": {"combine": "apart"}}, "reward.combine must be 'sum' unless two rewards"),
        (
            {"reward": {"combine": "apart", "weights": {"a": 1.0, "b": 1.0}}, "allocation": {"credit": "split"}},
            "reward.combine must be 'sum' with allocation.credit 'split'",
        ),
        ({"output": {"trackers": ["tensorboard", "tensorboard"]}}, "output.trackers must be different ones of"),
        ({"output": {"trackers": ["neptune"]}}, "output.trackers must be different ones of tensorboard, wandb"),
        ({"output": {"push_to_hub": "a/b/c"}}, "output.push_to_hub must be the id of a repository"),
    ],
)
def test_settings_without_an_effect_are_refused(
    configure: Callable[..., Config], parts: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        limits.check(configure(**parts), 1)
