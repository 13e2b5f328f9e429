"""The loss and the ratio from means of transitions equal those from velocities."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from flow_grpo_formulas import BATCH, close, rollout

from star_kernels import dance_sde, flow_cps, flow_sde
from star_kernels.integrations.flow_grpo import policy_loss
from star_kernels.integrations.means import mean_transition, policy_loss_of_means, ratio_of_means


def test_mean_transition_has_the_coefficients_of_the_sampler() -> None:
    sigma, following = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.9, 0.6, 0.0])
    sde = flow_sde(sigma, following, noise_level=0.7, sigma_max=0.9)
    root = torch.sqrt(sigma - following)
    of_means = mean_transition((sde.std / root)[:, None, None], root)
    torch.testing.assert_close(of_means.coefficients[2:], sde.coefficients[2:], rtol=1e-6, atol=1e-6)
    assert of_means.coefficients[:2].T.tolist() == [[0, 1]] * 3
    cps = flow_cps(sigma[:2], following[:2], noise_level=0.8)
    of_means = mean_transition(cps.std[:, None], root[:2], sde_type="cps")
    torch.testing.assert_close(of_means.coefficients[2:], cps.coefficients[2:], rtol=1e-6, atol=0)
    dance = dance_sde(sigma, following, eta=0.3)
    of_means = mean_transition(dance.std[:, None], root, sde_type="dance_sde")  # a scale that includes sqrt(-dt)
    torch.testing.assert_close(of_means.coefficients[2:5], dance.coefficients[2:5], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_the_kl_penalty_from_means_equals_that_from_velocities(sde_type: str) -> None:
    problem = rollout("flux", sde_type)
    step = (problem.made, problem.new_v, problem.timestep, problem.sample, problem.old.prev_sample)
    expected, _ = policy_loss(
        *step,
        problem.old.log_prob_mean,
        problem.advantages,
        beta=0.3,
        ref_model_output=problem.ref_v,
        **problem.settings,
    )
    new = problem.written(problem.new_v)
    loss, _ = policy_loss_of_means(
        new.mean, problem.old.prev_sample, new.std_dev_t, new.sqrt_dt, problem.advantages,
        old_log_prob=problem.old.log_prob_mean, beta=0.3, ref_prev_sample_mean=problem.written(problem.ref_v).mean,
        sde_type=sde_type,
    )  # fmt: skip
    close(loss, expected)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_the_ratio_of_means_equals_the_formulas(sde_type: str) -> None:
    problem = rollout("qwen_image", sde_type)
    v, w = (problem.new_v.clone().requires_grad_() for _ in range(2))
    new, expected = problem.written(v), problem.written(w)
    ratio = ratio_of_means(
        new.mean, problem.old.prev_sample, new.std_dev_t, new.sqrt_dt, old_prev_sample_mean=problem.old.mean,
        sde_type=sde_type,
    )  # fmt: skip
    written = (expected.log_prob_mean - problem.old.log_prob_mean).exp()
    upstream = torch.tensor([0.5, -1.0, 2.0, 1.0])
    (ratio * upstream).sum().backward()
    (written * upstream).sum().backward()
    close(ratio, written)
    close(v.grad, w.grad)


def test_the_ratio_of_means_applies_weights() -> None:
    problem = rollout("flux")
    new = problem.written(problem.new_v)
    arguments = (new.mean, problem.old.prev_sample, new.std_dev_t, new.sqrt_dt)
    weights = torch.rand(BATCH, 16, 16, generator=torch.Generator().manual_seed(1))
    ratio = ratio_of_means(*arguments, old_prev_sample_mean=problem.old.mean, weights=weights)
    change = (new.log_prob - problem.old.log_prob).mean(dim=-1)  # [B, S]
    close(ratio, (weights.flatten(1) * change).mean(dim=1).exp(), 1e-5)


def test_the_ratio_of_means_of_an_unchanged_model_is_one_with_guard_too() -> None:
    old = rollout("flux").old
    ratio = ratio_of_means(
        old.mean, old.prev_sample, old.std_dev_t, old.sqrt_dt, old_prev_sample_mean=old.mean, guard=True
    )
    close(ratio, torch.ones(BATCH))


def test_the_ratio_of_means_rejects_options_of_the_loss() -> None:
    old = rollout("flux").old
    arguments = (old.mean, old.prev_sample, old.std_dev_t, old.sqrt_dt)
    for name in ("adv_clip_max", "step_weights", "beta", "clip_range", "ratio"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            ratio_of_means(*arguments, old_prev_sample_mean=old.mean, **{name: 0.5})


def test_means_are_not_broadcast() -> None:
    old = rollout("flux").old
    for name in ("prev_sample", "old_prev_sample_mean"):
        latents = {"prev_sample": old.prev_sample, "old_prev_sample_mean": old.mean}
        latents[name] = latents[name][:1]
        with pytest.raises(ValueError, match=f"^{name} must have the shape of prev_sample_mean"):
            policy_loss_of_means(
                old.mean, std_dev_t=old.std_dev_t, sqrt_dt=old.sqrt_dt, advantages=torch.ones(BATCH), **latents
            )


def test_errors_name_the_argument() -> None:
    problem = rollout()
    arguments = (problem.old.mean, problem.old.prev_sample, torch.ones(4), torch.ones(4), problem.advantages)
    with pytest.raises(ValueError, match=r"old_prev_sample_mean must be given if old_log_prob is None, got None"):
        policy_loss_of_means(*arguments)
    with pytest.raises(ValueError, match=r"old_prev_sample_mean must be given with guard=True, got None"):
        policy_loss_of_means(*arguments, old_log_prob=torch.zeros(4), guard=True)
    with pytest.raises(ValueError, match=r"sde_type must be one of 'sde', 'cps', 'dance_sde', got 'ode'"):
        mean_transition(torch.ones(4), torch.ones(4), sde_type="ode")
