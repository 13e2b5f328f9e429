"""The step equals Flow-GRPO's in every layout and at every timestep."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("diffusers")

from flow_grpo_formulas import BATCH, LAYOUTS, close, rollout, scheduler, written_step

from star_kernels.integrations.flow_grpo import dense_sde_step_with_logprob, sde_step_with_logprob

SAMPLERS = ["sde", "cps"]


@pytest.mark.parametrize("sde_type", SAMPLERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sampled_step_equals_flow_grpos(layout: str, sde_type: str) -> None:
    problem = rollout(layout, sde_type)
    noise = torch.randn(LAYOUTS[layout], generator=torch.Generator().manual_seed(3))
    expected = written_step(
        problem.made, problem.old_v, problem.timestep, problem.sample, noise=noise, **problem.settings
    )
    got = sde_step_with_logprob(
        problem.made,
        problem.old_v,
        problem.timestep,
        problem.sample,
        noise_level=problem.noise_level,
        generator=torch.Generator().manual_seed(3),
        sde_type=sde_type,
        return_sqrt_dt=True,
    )
    for result, written in zip(
        got,
        (expected.prev_sample, expected.log_prob_mean, expected.mean, expected.std_dev_t, expected.sqrt_dt),
        strict=True,
    ):
        close(result, written)


@pytest.mark.parametrize("sde_type", SAMPLERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_given_latent_has_flow_grpos_log_probability_and_gradient(layout: str, sde_type: str) -> None:
    problem = rollout(layout, sde_type)
    upstream = torch.tensor([0.3, -1.0, 2.0, 0.7])
    results = []
    for v in (problem.new_v.clone().requires_grad_(), problem.new_v.clone().requires_grad_()):
        if not results:
            log_prob, mean = problem.written(v).log_prob_mean, problem.written(v).mean
        else:
            prev, log_prob, mean, _ = sde_step_with_logprob(
                problem.made, v, problem.timestep, problem.sample, problem.noise_level, problem.old.prev_sample,
                sde_type=sde_type,
            )  # fmt: skip
            assert torch.equal(prev, problem.old.prev_sample)
        (log_prob * upstream).sum().backward()
        results.append((log_prob.detach(), mean.detach(), v.grad))
    for written, got in zip(*results, strict=True):
        close(got, written)


@pytest.mark.parametrize("sde_type", SAMPLERS)
def test_every_timestep_of_a_schedule_is_found(sde_type: str) -> None:
    made = scheduler("flux", steps=20)
    last = 19 if sde_type == "cps" else 20  # Flow-CPS's last step has no noise
    x, v, noise = torch.randn(3, last, 5, 8, generator=torch.Generator().manual_seed(0))
    timesteps = made.timesteps[:last].flip(0)
    expected = written_step(made, v, timesteps, x, sde_type=sde_type, noise=noise)
    _, log_prob, mean, std, sqrt_dt = sde_step_with_logprob(
        made, v, timesteps, x, prev_sample=expected.prev_sample, sde_type=sde_type, return_sqrt_dt=True
    )
    close(mean, expected.mean)
    close(log_prob, expected.log_prob_mean)
    close(std, expected.std_dev_t)
    close(sqrt_dt, expected.sqrt_dt)


def test_one_timestep_applies_to_the_whole_batch() -> None:
    problem = rollout(steps=(4, 4, 4, 4))
    one = problem.made.timesteps[4]
    generators = [torch.Generator().manual_seed(1) for _ in range(4)]
    each = sde_step_with_logprob(problem.made, problem.old_v, problem.timestep, problem.sample, generator=generators[0])
    for g, timestep in zip(generators[1:], (one.unsqueeze(0), one, float(one)), strict=True):
        got = sde_step_with_logprob(problem.made, problem.old_v, timestep, problem.sample, generator=g)
        assert got[3].shape == (1, 1, 1, 1)
        for a, b in zip(got, each, strict=True):
            torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=0, atol=0)


def test_dense_log_probabilities_average_to_flow_grpos() -> None:
    for layout, shape in {"sd3": (BATCH, 16, 16), "flux": (BATCH, 256), "wan": (BATCH, 3, 8, 12)}.items():
        problem = rollout(layout)
        arguments = (problem.made, problem.old_v, problem.timestep, problem.sample)
        for prev in (None, problem.old.prev_sample):
            scalar, dense = (
                step(*arguments, prev_sample=prev, generator=torch.Generator().manual_seed(1))[1]
                for step in (sde_step_with_logprob, dense_sde_step_with_logprob)
            )
            assert dense.shape == shape
            close(dense.flatten(1).mean(dim=1), scalar)


def test_a_sampled_step_is_differentiable_if_its_velocity_is() -> None:
    problem = rollout()
    v = problem.old_v.clone().requires_grad_()
    prev, log_prob, _, _ = sde_step_with_logprob(
        problem.made, v, problem.timestep, problem.sample, generator=torch.Generator().manual_seed(1)
    )
    (gradient,) = torch.autograd.grad(log_prob.sum(), v)
    again = problem.old_v.clone().requires_grad_()
    written = written_step(problem.made, again, problem.timestep, problem.sample, prev=prev)
    (expected,) = torch.autograd.grad(written.log_prob_mean.sum(), again)
    close(gradient, expected)


def test_a_list_of_generators_has_one_for_each_sample() -> None:
    problem = rollout()
    seeds = [5, 6, 5, 7]
    prev = sde_step_with_logprob(
        problem.made, problem.old_v, problem.timestep, problem.sample,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )[0]  # fmt: skip
    noise = torch.cat(
        [torch.randn(1, *problem.sample.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    close(prev, written_step(problem.made, problem.old_v, problem.timestep, problem.sample, noise=noise).prev_sample)


@pytest.mark.parametrize("sde_type", SAMPLERS)
def test_without_noise_it_is_the_ode(sde_type: str) -> None:
    problem = rollout(sde_type=sde_type)
    prev, log_prob, mean, std = sde_step_with_logprob(
        problem.made, problem.old_v, problem.timestep, problem.sample, noise_level=0, sde_type=sde_type
    )
    index = torch.tensor([0, 2, 5, 8])
    dt = (problem.made.sigmas[index + 1] - problem.made.sigmas[index]).view(-1, 1, 1, 1)
    close(prev, problem.sample + problem.old_v * dt)
    close(mean, prev)
    assert not bool(std.any())
    if sde_type == "sde":
        assert bool(log_prob.isnan().all())
    else:
        assert float(log_prob.abs().max()) < 1e-12


def test_half_precision_is_converted_to_float32_as_in_flow_grpo() -> None:
    problem = rollout()
    v, x = problem.old_v.bfloat16(), problem.sample.bfloat16()
    got = sde_step_with_logprob(problem.made, v, problem.timestep, x, prev_sample=problem.old.prev_sample.bfloat16())
    expected = written_step(
        problem.made, v.float(), problem.timestep, x.float(), prev=problem.old.prev_sample.bfloat16().float()
    )
    assert {result.dtype for result in got} == {torch.float32}
    close(got[1], expected.log_prob_mean)
    drawn = sde_step_with_logprob(problem.made, v, problem.timestep, x, generator=torch.Generator().manual_seed(1))
    assert {result.dtype for result in drawn} == {torch.float32}
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    close(drawn[0], written_step(problem.made, v.float(), problem.timestep, x.float(), noise=noise).prev_sample)


def test_the_signature_is_flow_grpos() -> None:
    parameters = inspect.signature(sde_step_with_logprob).parameters
    positional = {n: p.default for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    empty = inspect.Parameter.empty
    assert list(positional.items()) == [
        ("self", empty), ("model_output", empty), ("timestep", empty), ("sample", empty), ("noise_level", 0.7),
        ("prev_sample", None), ("generator", None), ("sde_type", "sde"), ("return_sqrt_dt", False),
    ]  # fmt: skip


def test_errors_name_the_argument() -> None:
    problem = rollout()
    arguments = (problem.made, problem.old_v, problem.timestep, problem.sample)
    with pytest.raises(ValueError, match=r"sde_type must be 'sde' or 'cps', got 'dance'"):
        sde_step_with_logprob(*arguments, sde_type="dance")
    with pytest.raises(ValueError, match=r"noise_level must be positive and finite, got -1"):
        sde_step_with_logprob(*arguments, noise_level=-1)
    with pytest.raises(ValueError, match=r"timestep must have one element or 4, one for each sample, got shape \[3\]"):
        sde_step_with_logprob(problem.made, problem.old_v, problem.timestep[:3], problem.sample)
    with pytest.raises(ValueError, match=r"generator must be one generator or a list of 4, one for each sample, got 2"):
        sde_step_with_logprob(*arguments, generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(ValueError, match=r"model_output must be packed .* got \[4, 16\]"):
        sde_step_with_logprob(problem.made, torch.zeros(4, 16), problem.timestep, problem.sample)


@pytest.mark.parametrize("name", ["sample", "prev_sample"])
def test_latents_are_not_broadcast(name: str) -> None:
    problem = rollout("flux")
    latents = {"sample": problem.sample, "prev_sample": problem.old.prev_sample}
    latents[name] = latents[name][:1]
    with pytest.raises(ValueError, match=f"^{name} must have the shape of model_output"):
        sde_step_with_logprob(problem.made, problem.new_v, problem.timestep, **latents)


def test_the_channel_dimension_can_be_chosen() -> None:
    """A packed latent with channels first, [B, C, S]."""
    problem = rollout("flux", "sde")
    first = [t.transpose(1, 2) for t in (problem.new_v, problem.sample, problem.old.prev_sample)]
    results = [
        dense_sde_step_with_logprob(problem.made, v, problem.timestep, sample, 0.7, prev, **options)
        for (v, sample, prev), options in (
            ((problem.new_v, problem.sample, problem.old.prev_sample), {}),
            (first, {"channel_dim": 1}),
        )
    ]
    close(results[1][1], results[0][1])
    close(results[1][2].transpose(1, 2), results[0][2])
