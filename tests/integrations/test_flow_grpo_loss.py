"""The loss and its gradient equal those of Flow-GRPO's scripts, and of GRPO-Guard's."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from flow_grpo_formulas import BATCH, LAYOUTS, Rollout, close, rollout, written_loss, written_step

from star_kernels import flow_sde, weighted_policy_loss
from star_kernels.integrations.flow_grpo import (
    dense_sde_step_with_logprob,
    policy_loss,
    sde_step_with_logprob,
    step_loss,
)

SAMPLERS = ["sde", "cps"]
WIDE = {"clip_range": 0.05}  # some ratios are outside, some inside


def leaf(problem: Rollout) -> Tensor:
    return problem.new_v.clone().requires_grad_()


def arguments(problem: Rollout, v: Tensor, old_log_prob: Tensor | None = None) -> tuple[Any, ...]:
    old = problem.old.log_prob_mean if old_log_prob is None else old_log_prob
    return problem.made, v, problem.timestep, problem.sample, problem.old.prev_sample, old, problem.advantages


def both(problem: Rollout, options: dict[str, Any], written: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], dict]:
    """Loss and gradient of the formulas and of the fused loss, and the metrics of the fused loss."""
    v = leaf(problem)
    expected = written_loss(problem.written(v), problem.old.log_prob_mean, problem.advantages, **written)
    expected.backward()
    w = leaf(problem)
    loss, metrics = policy_loss(*arguments(problem, w), **problem.settings, **options)
    loss.backward()
    return [expected.detach(), v.grad], [loss.detach(), w.grad], metrics


@pytest.mark.parametrize("sde_type", SAMPLERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_weights_loss_and_gradient_are_flow_grpos(layout: str, sde_type: str) -> None:
    problem = rollout(layout, sde_type)
    for clip in ({"clip_range": 1e-4}, WIDE):
        expected, got, metrics = both(problem, clip, clip)
        for a, b in zip(got, expected, strict=True):
            close(a, b)
        outside = float(metrics["clipfrac"])
        assert 0 < outside < 1 if clip == WIDE else outside == 1
        moving = got[1].flatten(1).any(dim=1)
        assert bool(moving.any())
        assert not bool(moving.all())  # clipped samples have no gradient


def test_after_a_small_step_of_training_it_is_as_exact_as_flow_grpo() -> None:
    """Compared with float64, the error of the fused loss is at most twice that of eager float32."""
    problem = rollout(drift=0.02)
    exact, eager, fused = (leaf(problem) for _ in range(3))
    wide = replace(
        problem, sample=problem.sample.double(), old=replace(problem.old, prev_sample=problem.old.prev_sample.double())
    )
    old = problem.written(problem.old_v).log_prob_mean
    old_exact = wide.written(problem.old_v.double()).log_prob_mean
    clip = {"clip_range": 1.0}
    written_loss(wide.written(exact.double()), old_exact, problem.advantages.double(), **clip).backward()
    written_loss(problem.written(eager), old, problem.advantages, **clip).backward()
    policy_loss(*arguments(problem, fused, old), **clip).loss.backward()
    error = [float((v.grad - exact.grad).norm()) for v in (eager, fused)]
    assert error[1] <= 2 * error[0]


@pytest.mark.parametrize("sde_type", SAMPLERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kl_penalty_is_flow_grpos(layout: str, sde_type: str) -> None:
    problem = rollout(layout, sde_type)
    options = {**WIDE, "beta": 0.4}
    reference = problem.written(problem.ref_v)
    expected, got, metrics = both(
        problem, {**options, "ref_model_output": problem.ref_v}, {**options, "reference": reference}
    )
    for a, b in zip(got, expected, strict=True):
        close(a, b)
    without, _, _ = both(problem, WIDE, WIDE)
    close(metrics["policy_loss"], without[0])
    close(0.4 * metrics["kl_loss"], expected[0] - without[0], 1e-5)


def test_without_beta_the_reference_is_ignored() -> None:
    """The KL penalty of Flow-CPS's last step, which has no noise, would be NaN."""
    problem = rollout(sde_type="cps", steps=(9, 9, 9, 9))
    loss, metrics = policy_loss(*arguments(problem, problem.new_v), ref_model_output=problem.ref_v, **problem.settings)
    assert bool(loss.isfinite())
    assert "kl_loss" not in metrics


def test_at_the_start_every_ratio_is_one() -> None:
    for layout in LAYOUTS:
        problem = rollout(layout, drift=0.0)
        for step in (sde_step_with_logprob, dense_sde_step_with_logprob):
            old = step(*arguments(problem, problem.old_v)[:4], prev_sample=problem.old.prev_sample)[1]
            _, metrics = policy_loss(*arguments(problem, problem.old_v, old))
            close(metrics["ratio_mean"], torch.tensor(1.0))
            assert float(metrics["clipfrac"]) == 0


def test_log_probabilities_of_the_rollout_give_a_ratio_of_one() -> None:
    problem = rollout()
    drawn = sde_step_with_logprob(problem.made, problem.old_v, problem.timestep, problem.sample)
    problem = replace(problem, old=replace(problem.old, prev_sample=drawn[0]))
    _, metrics = policy_loss(*arguments(problem, problem.old_v, drawn[1]))
    close(metrics["ratio_max"], torch.tensor(1.0))


def test_dense_old_log_probabilities_are_accepted_without_weights() -> None:
    problem = rollout("flux")
    dense = dense_sde_step_with_logprob(*arguments(problem, problem.old_v)[:4], prev_sample=problem.old.prev_sample)[1]
    loss, _ = policy_loss(*arguments(problem, problem.new_v, dense), **WIDE)
    scalar, _ = policy_loss(*arguments(problem, problem.new_v), **WIDE)
    close(loss, scalar)


@pytest.mark.parametrize("layout", ["sd3", "flux"])
def test_weights_are_those_of_weighted_policy_loss_and_ones_change_nothing(layout: str) -> None:
    problem = rollout(layout)
    dense = dense_sde_step_with_logprob(*arguments(problem, problem.old_v)[:4], prev_sample=problem.old.prev_sample)[1]
    grid = (8, 8) if layout == "sd3" else (16, 16)  # patches of SD3, sequence of FLUX
    loss, _ = policy_loss(*arguments(problem, problem.new_v, dense), weights=torch.ones(BATCH, *grid), **WIDE)
    plain, _ = policy_loss(*arguments(problem, problem.new_v), **WIDE)
    close(loss, plain)
    weights = torch.rand(BATCH, *grid, generator=torch.Generator().manual_seed(2)) * 2
    loss, _ = policy_loss(*arguments(problem, problem.new_v, dense), weights=weights, ratio="location", **WIDE)
    index = [0, 2, 5, 8]
    sigmas = problem.made.sigmas
    transition = flow_sde(sigmas[index], sigmas[[i + 1 for i in index]], sigma_max=sigmas[1])
    expected, _ = weighted_policy_loss(
        problem.new_v, problem.sample, problem.old.prev_sample, dense, problem.advantages, transition,
        weights=weights.flatten(1) if layout == "flux" else weights, ratio="location",
        channel_dim=-1 if layout == "flux" else 1, **WIDE,
    )  # fmt: skip
    close(loss, expected)
    assert abs(float(loss - plain)) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", ["old_model_output", "old_prev_sample_mean"])
def test_guard_is_the_published_normalisation_of_each_sample(layout: str, given: str) -> None:
    problem = rollout(layout, steps=(2, 5, 7, 4))
    old = {"old_model_output": problem.old_v, "old_prev_sample_mean": problem.old.mean}[given]
    clip = {"clip_range": 2e-4}
    expected, got, _ = both(problem, {**clip, given: old}, {**clip, "old_mean": problem.old.mean})
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-5)  # the drift is a difference of means, 20 times larger, rounded to 1e-7


def test_guard_at_the_start_has_a_ratio_of_one() -> None:
    problem = rollout(drift=0.0)
    _, metrics = policy_loss(*arguments(problem, problem.old_v), old_model_output=problem.old_v)
    close(metrics["ratio_mean"], torch.tensor(1.0))


def config(**train: Any) -> SimpleNamespace:
    settings = {"clip_range": 0.05, "adv_clip_max": 5, "beta": 0.0, **train}
    return SimpleNamespace(sample=SimpleNamespace(noise_level=0.7), train=SimpleNamespace(**settings))


def batch(problem: Rollout) -> dict[str, Tensor]:
    """The dictionary of the scripts, [B, Steps, ...]; step 0 is NaN."""
    step = {
        "latents": problem.sample,
        "next_latents": problem.old.prev_sample,
        "timesteps": problem.timestep,
        "log_probs": problem.old.log_prob_mean,
        "advantages": problem.advantages.double(),  # as computed with numpy
    }
    return {name: torch.stack([torch.full_like(t, torch.nan), t], dim=1) for name, t in step.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_batch_and_config_of_a_script_give_its_loss(layout: str) -> None:
    problem = rollout(layout)
    info: dict[str, list[Tensor]] = defaultdict(list)
    v, w = leaf(problem), leaf(problem)
    settings = config(beta=0.1)
    loss = step_loss(problem.made, v, batch(problem), 1, settings, problem.ref_v, info=info)
    loss.backward()
    written = written_loss(
        problem.written(w), problem.old.log_prob_mean, problem.advantages.double(), clip_range=0.05, beta=0.1,
        reference=problem.written(problem.ref_v),
    )  # fmt: skip
    written.backward()
    close(loss, written)
    close(v.grad, w.grad)
    assert set(info) >= {"policy_loss", "kl_loss", "loss", "approx_kl", "clipfrac"}
    assert {len(values) for values in info.values()} == {1}
    log_ratio = problem.written(problem.new_v).log_prob_mean - problem.old.log_prob_mean
    close(info["approx_kl"][0], 0.5 * (log_ratio**2).mean(), 1e-5)
    close(info["clipfrac"][0], ((log_ratio.exp() - 1).abs() > 0.05).float().mean())


def test_the_batch_of_a_script_may_have_weights_and_old_means() -> None:
    problem = rollout(steps=(2, 5, 7, 4))
    dense = dense_sde_step_with_logprob(*arguments(problem, problem.old_v)[:4], prev_sample=problem.old.prev_sample)[1]
    weights = torch.rand(BATCH, 8, 8, generator=torch.Generator().manual_seed(2)) * 2
    sample = {**batch(problem), "weights": torch.stack([torch.zeros_like(weights), weights], dim=1)}
    sample["log_probs"] = torch.stack([dense, dense], dim=1)
    expected, _ = policy_loss(*arguments(problem, problem.new_v, dense), weights=weights, **WIDE)
    close(step_loss(problem.made, problem.new_v, sample, 1, config()), expected)
    sample["prev_sample_mean"] = torch.stack([problem.old.mean, problem.old.mean], dim=1)
    settings = config()
    settings.rationorm = True
    expected, _ = policy_loss(
        *arguments(problem, problem.new_v, dense), weights=weights, old_prev_sample_mean=problem.old.mean, **WIDE
    )
    close(step_loss(problem.made, problem.new_v, sample, 1, settings), expected)


def test_the_sampler_of_a_script_and_options_are_used() -> None:
    problem = rollout(sde_type="cps")
    settings = config()
    settings.sample = SimpleNamespace(noise_level=0.8, sde_type="cps")
    expected, _ = policy_loss(*arguments(problem, problem.new_v), clip_range=0.5, **problem.settings)
    close(step_loss(problem.made, problem.new_v, batch(problem), 1, settings, clip_range=0.5), expected)


def test_half_precision_velocities_give_the_loss_of_their_float32_values() -> None:
    problem = rollout("flux")
    half = replace(problem, new_v=problem.new_v.bfloat16())
    widened = replace(problem, new_v=half.new_v.float())
    close(
        policy_loss(*arguments(half, half.new_v), **WIDE).loss,
        policy_loss(*arguments(widened, widened.new_v), **WIDE).loss,
    )


def test_the_noise_weighting_of_tempflow_is_a_step_weight() -> None:
    problem = rollout(steps=(3, 3, 3, 3))
    new = problem.written(problem.new_v)
    weight = 2.25 * new.std_dev_t.flatten()
    expected = weight[0] * written_loss(new, problem.old.log_prob_mean, problem.advantages, **WIDE)
    loss, _ = policy_loss(*arguments(problem, problem.new_v), step_weights=weight, **WIDE)
    close(loss, expected)


def test_errors_name_the_argument() -> None:
    problem = rollout()
    good = arguments(problem, problem.new_v)
    with pytest.raises(ValueError, match=r"ref_model_output must be given if beta is not 0, got None with beta=0.1"):
        policy_loss(*good, beta=0.1)
    with pytest.raises(ValueError, match=r"old_prev_sample_mean must be None if old_model_output is given"):
        policy_loss(*good, old_model_output=problem.old_v, old_prev_sample_mean=problem.old.mean)
    with pytest.raises(ValueError, match=r"old_log_prob must have shape .* without weights"):
        policy_loss(*good, weights=torch.ones(BATCH, 8, 8))
    with pytest.raises(KeyError, match="next_latents"):
        step_loss(
            problem.made,
            problem.new_v,
            {"timesteps": problem.timestep[:, None], "latents": problem.sample[:, None]},
            0,
            config(),
        )


def test_an_old_mean_is_not_broadcast() -> None:
    problem = rollout("flux")
    with pytest.raises(ValueError, match=r"^old_prev_sample_mean must have the shape of model_output"):
        policy_loss(*arguments(problem, problem.new_v), old_prev_sample_mean=problem.old.mean[:1], **problem.settings)


def test_the_formulas_score_a_sampled_latent_with_its_density() -> None:
    """The formulas of these tests are consistent: the log-probability of a sampled latent is that of its noise."""
    problem = rollout()
    again = written_step(problem.made, problem.old_v, problem.timestep, problem.sample, prev=problem.old.prev_sample)
    std = again.std_dev_t * again.sqrt_dt
    expected = torch.distributions.Normal(again.mean, std).log_prob(problem.old.prev_sample)
    close(again.log_prob, expected)
