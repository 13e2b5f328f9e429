"""step_loss in Flow-GRPO's scripts: windows, divided losses, GRPO-Guard's script, its metrics, and wrong samplers."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from flow_grpo_formulas import Rollout, close, rollout

from star_kernels.integrations.deferred import DeferredChecks, _Pending
from star_kernels.integrations.flow_grpo import dense_sde_step_with_logprob, step_loss, window
from star_kernels.integrations.record import RecordedMaps
from star_kernels.integrations.schedule import step_at


def config(noise_level: float = 0.7, sde_type: str = "sde", **settings: Any) -> SimpleNamespace:
    train = {"clip_range": 0.05, "adv_clip_max": 5, "beta": 0.0, **settings}
    rationorm = train.pop("rationorm", False)
    sample = SimpleNamespace(noise_level=noise_level, sde_type=sde_type)
    return SimpleNamespace(sample=sample, train=SimpleNamespace(**train), rationorm=rationorm)


def batch(problem: Rollout) -> dict[str, Tensor]:
    """The dictionary of the scripts, with one step."""
    found = {
        "latents": problem.sample,
        "next_latents": problem.old.prev_sample,
        "timesteps": problem.timestep,
        "log_probs": problem.old.log_prob_mean,
        "advantages": problem.advantages.double(),
        "prev_sample_mean": problem.old.mean,
    }
    return {name: value[:, None] for name, value in found.items()}


def test_a_window_is_found_in_the_schedule() -> None:
    scheduler = rollout().made
    steps = scheduler.timesteps
    assert window(scheduler, list(steps[2:4])) == slice(2, 4)
    assert window(scheduler, steps[2:4].repeat(3, 1)) == slice(2, 4)
    assert window(scheduler, steps) == slice(0, len(steps))
    for wrong in (steps[[2, 4]], steps[[3, 2]], torch.tensor([7.0])):
        with pytest.raises(ValueError, match="timesteps must be consecutive steps of the scheduler"):
            window(scheduler, wrong)


def test_weights_of_a_window_are_those_of_its_maps() -> None:
    recorded = RecordedMaps(None)  # type: ignore[arg-type]
    recorded.maps = [torch.rand(2, 1, 3, 4) for _ in range(5)]
    every, some = recorded.weights(), recorded.weights(steps=slice(1, 3))
    assert torch.equal(some, every[:, 1:3])
    shared = recorded.weights(steps=slice(1, 3), over="trajectory")
    close(shared.flatten(1).mean(dim=1), torch.ones(2))  # among the steps of the window
    for part in (slice(None, 2), slice(3, None), slice(-2, None), slice(0, 5, 2)):
        assert torch.equal(recorded.weights(steps=part), every[:, part])
    for wrong in (slice(4, 6), slice(-6, None), slice(2, 2)):
        with pytest.raises(ValueError, match="steps must be recorded passes, of which there are 5, got"):
            recorded.weights(steps=wrong)


@pytest.mark.parametrize("name", ["weights", "next_latents", "log_probs", "timesteps"])
def test_tensors_of_other_steps_are_an_error(name: str) -> None:
    problem = rollout()
    dense = dense_sde_step_with_logprob(
        problem.made, problem.old_v, problem.timestep, problem.sample, prev_sample=problem.old.prev_sample
    )[1]
    sample = batch(problem) | {"log_probs": dense[:, None], "weights": torch.ones(4, 1, 8, 8)}
    step_loss(problem.made, problem.new_v, sample, 0, config())
    sample[name] = sample[name].repeat_interleave(10, dim=1)
    with pytest.raises(ValueError, match=rf"{name} must have the steps of latents, 1, got 10; .*window\(pipeline.sch"):
        step_loss(problem.made, problem.new_v, sample, 0, config())


def test_the_loss_is_divided_as_in_the_scripts_for_qwen_image() -> None:
    problem = rollout("flux")
    infos: list[dict[str, list[Tensor]]] = [defaultdict(list), defaultdict(list)]
    arguments = (problem.made, problem.new_v, batch(problem), 0, config(beta=0.1), problem.ref_v)
    whole = step_loss(*arguments, info=infos[0])
    part = step_loss(*arguments, info=infos[1], gradient_accumulation_steps=18)
    close(18 * part, whole)
    for name, (value,) in infos[0].items():
        divided = name in ("loss", "policy_loss", "kl_loss")
        torch.testing.assert_close(infos[1][name][0] * (18 if divided else 1), value)


@pytest.mark.parametrize("ratio", ["sample", "location"])
def test_clip_fractions_are_of_ratios_above_and_below(ratio: str) -> None:
    problem = rollout(drift=0.3)
    sample = batch(problem)
    dense = dense_sde_step_with_logprob(
        problem.made, problem.old_v, problem.timestep, problem.sample, prev_sample=problem.old.prev_sample
    )[1]
    sample["log_probs"] = dense[:, None]
    info: dict[str, list[Tensor]] = defaultdict(list)
    step_loss(problem.made, problem.new_v, sample, 0, config(clip_range=0.02), info=info, ratio=ratio)
    change = problem.written(problem.new_v).log_prob.mean(dim=1) - dense
    rho = change.exp() if ratio == "location" else change.flatten(1).mean(dim=1).exp()
    above, below = (rho - 1 > 0.02).float().mean(), (1 - rho > 0.02).float().mean()
    assert 0 < float(below) < 1
    for name, expected in {"clipfrac_gt_one": above, "clipfrac_lt_one": below, "clipfrac": above + below}.items():
        torch.testing.assert_close(info[name][0], expected)
    close(info["log_prob_diff/step_0/mean"][0], change.abs().mean(), 1e-4)
    close(info["log_prob_diff/step_0/max"][0], change.abs().amax(), 1e-4)


def script_guard(problem: Rollout, v: Tensor, clip: float, beta: float) -> Tensor:
    """The loss of train_sd3_GRPO_Guard.py: drift and scale are means over the batch."""
    new, reference = problem.written(v), problem.written(problem.ref_v)
    scale = new.sqrt_dt.mean() * new.std_dev_t.mean()
    drift = (new.mean - problem.old.mean).square().mean() / (2 * scale**2)
    ratio = ((new.log_prob_mean - problem.old.log_prob_mean + drift) * scale).exp()
    a = problem.advantages.clamp(-5, 5)
    policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)).mean() / new.sqrt_dt.mean() ** 2
    squares = (new.mean - reference.mean).square().flatten(1).mean(dim=1)
    return policy + beta * (squares / (2 * new.std_dev_t.flatten() ** 2)).mean()


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_guard_without_weights_is_the_script(drift: float) -> None:
    problem = rollout(steps=(2, 2, 2, 2), drift=drift)
    settings = config(rationorm=True, clip_range=2e-2, beta=0.1)
    v, w = (problem.new_v.clone().requires_grad_() for _ in range(2))
    info: dict[str, list[Tensor]] = defaultdict(list)
    loss = step_loss(problem.made, v, batch(problem), 0, settings, problem.ref_v, info=info)
    expected = script_guard(problem, w, 2e-2, 0.1)
    loss.backward()
    expected.backward()
    close(loss, expected, 1e-5)
    close(v.grad, w.grad, 1e-4)
    torch.testing.assert_close(info["clipfrac"][0], info["clipfrac_gt_one"][0] + info["clipfrac_lt_one"][0])
    assert {"policy_loss", "kl_loss", "loss", "approx_kl"} < info.keys()
    if not drift:
        close(info["ratio_mean"][0], torch.tensor(1.0))


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_another_sampler_noise_level_or_step_is_an_error(sde_type: str) -> None:
    problem = rollout(sde_type=sde_type, steps=(2, 3, 5, 6))
    right = {"noise_level": problem.noise_level, "sde_type": sde_type}
    sample = batch(problem)
    step_loss(problem.made, problem.new_v, sample, 0, config(**right))
    other = {"sde_type": "cps" if sde_type == "sde" else "sde"}
    for wrong in (other, {"noise_level": 0.5}):
        with pytest.raises(ValueError, match="log_probs of step 0 must be those of the sampler, got sde_type="):
            step_loss(problem.made, problem.new_v, sample, 0, config(**{**right, **wrong}))
    sample["timesteps"] = sample["timesteps"].roll(2, dims=0)
    with pytest.raises(ValueError, match="the rollout used another sampler, noise level or step"):
        step_loss(problem.made, problem.new_v, sample, 0, config(**right))
    sample["timesteps"] = sample["timesteps"] + 0.5
    with pytest.raises(ValueError, match="timesteps of step 0 are not in the scheduler's schedule"):
        step_loss(problem.made, problem.new_v, sample, 0, config(**right))


def test_a_diverged_model_is_not_reported_as_another_sampler() -> None:
    problem = rollout()
    sample = batch(problem)
    sample["log_probs"] = sample["log_probs"] * torch.nan
    assert bool(step_loss(problem.made, problem.new_v, sample, 0, config()).isnan())


def test_wans_solver_is_refused() -> None:
    from diffusers import UniPCMultistepScheduler

    made = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    made.set_timesteps(5)
    with pytest.raises(ValueError, match="the solver UniPCMultistepScheduler; Flow-GRPO's script for Wan"):
        step_at(made, made.timesteps[:1], torch.zeros(1, 4, 8, 8))


class Event:
    """A copy from the device that arrives when the test says so."""

    def __init__(self) -> None:
        self.arrived, self.waited = False, False

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.arrived = self.waited = True


def test_a_check_of_a_device_raises_at_a_later_call_without_a_wait() -> None:
    checks, event = DeferredChecks(), Event()
    checks._pending.append(_Pending(torch.ones(1), event, lambda numbers: "wrong"))
    checks.settle()
    checks.add(torch.zeros(1), lambda numbers: None)
    assert not event.waited
    event.arrived = True
    with pytest.raises(ValueError, match="wrong"):
        checks.add(torch.zeros(1), lambda numbers: None)
    checks.settle()
    assert not event.waited
