"""Steps are found by timestep, and the coefficients cached for a schedule are freed with it."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler
from flow_grpo_formulas import scheduler

from star_kernels import flow_cps, flow_sde
from star_kernels.integrations import schedule
from star_kernels.integrations.schedule import step_at

LATENTS = torch.zeros(3, 2, 4, 4)


def test_a_step_has_the_coefficients_of_its_sampler() -> None:
    made = scheduler()
    chosen = [7, 0, 3]
    sigma, following = made.sigmas[chosen], made.sigmas[[8, 1, 4]]
    sde = step_at(made, made.timesteps[chosen], LATENTS, noise_level=0.4)
    expected = flow_sde(sigma, following, noise_level=0.4, sigma_max=made.sigmas[1])
    assert torch.equal(sde.transition.coefficients, expected.coefficients)
    torch.testing.assert_close(sde.std_dev_t * sde.sqrt_dt, expected.std)
    cps = step_at(made, made.timesteps[chosen], LATENTS, noise_level=0.4, sde_type="cps")
    assert torch.equal(cps.transition.coefficients, flow_cps(sigma, following, noise_level=0.4).coefficients)
    assert torch.equal(cps.std_dev_t, cps.transition.std)


def test_a_new_schedule_is_used() -> None:
    made = scheduler(steps=10)
    before = step_at(made, made.timesteps[2], LATENTS)
    made.set_timesteps(40)
    after = step_at(made, made.timesteps[2], LATENTS)
    assert float(after.sqrt_dt) < float(before.sqrt_dt)


def test_sigmas_changed_in_place_are_used() -> None:
    made = scheduler()
    step_at(made, made.timesteps[2], LATENTS)
    made.sigmas[3] -= 0.01
    expected = torch.sqrt(made.sigmas[2] - made.sigmas[3])
    torch.testing.assert_close(step_at(made, made.timesteps[2], LATENTS).sqrt_dt, expected[None])


def test_sigmas_replaced_without_timesteps_are_used() -> None:
    made = scheduler()
    step_at(made, made.timesteps[2], LATENTS)
    made.sigmas = made.sigmas * 0.9
    expected = torch.sqrt(made.sigmas[2] - made.sigmas[3])
    torch.testing.assert_close(step_at(made, made.timesteps[2], LATENTS).sqrt_dt, expected[None])


def test_a_timestep_of_another_schedule_gives_nan() -> None:
    made, other = scheduler(steps=10), scheduler(steps=7)
    timestep = torch.stack([made.timesteps[1], other.timesteps[1], made.timesteps[1]])
    step = step_at(made, timestep, LATENTS)
    assert step.transition.coefficients.isnan().all(dim=0).tolist() == [False, True, False]
    assert step.sqrt_dt.isnan().tolist() == [False, True, False]


def test_of_equal_timesteps_the_second_is_used_as_in_diffusers() -> None:
    sigmas = torch.tensor([0.9, 0.6, 0.6, 0.3, 0.0])
    made = FlowMatchEulerDiscreteScheduler()
    made.sigmas, made.timesteps = sigmas, torch.tensor([900.0, 600.0, 600.0, 300.0])
    made.sigmas[2] = 0.55  # equal timesteps of unequal steps
    assert made.index_for_timestep(torch.tensor(600.0)) == 2
    step = step_at(made, 600.0, LATENTS)
    torch.testing.assert_close(step.sqrt_dt, torch.tensor([0.25]).sqrt())


def test_cached_coefficients_are_freed_with_the_schedule() -> None:
    made = scheduler()
    step_at(made, made.timesteps[2], LATENTS)
    kept = weakref.ref(schedule._schedules[made.timesteps])
    made.set_timesteps(5)
    gc.collect()
    assert kept() is None


def test_schedules_of_inference_mode_are_supported() -> None:
    with torch.inference_mode():
        made = scheduler()
        inside = step_at(made, made.timesteps[2], LATENTS).transition.coefficients.clone()
    made = scheduler()
    assert torch.equal(inside, step_at(made, made.timesteps[2], LATENTS).transition.coefficients)


def test_a_scheduler_without_a_schedule_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"scheduler must have timesteps \[N\] .* set_timesteps.*\[1000\] and \[1000\]"
    ):
        step_at(FlowMatchEulerDiscreteScheduler(), 1.0, LATENTS)
    with pytest.raises(TypeError, match=r"scheduler must have tensors timesteps and sigmas.* got SimpleNamespace"):
        step_at(SimpleNamespace(timesteps=[1.0]), 1.0, LATENTS)
