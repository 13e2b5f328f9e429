"""The objectives and the sampling step at the ends of their ranges, and with NaN or infinity in one sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import BATCH, RATIOS, SIGMA, Problem, close, make, patch_weights
from torch import Tensor

from star_kernels import (
    Transition,
    dance_sde,
    flow_cps,
    flow_sde,
    sample_transition,
    weighted_nft_loss,
    weighted_policy_loss,
)

OTHERS = [0, 2, 3]
BROKEN = [torch.nan, torch.inf, -torch.inf]


def policy(problem: Problem, backend: str, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaf = problem.model_output.detach().requires_grad_()
    options = {"clip_range": 0.5, **options, "channel_dim": problem.channel_dim, "backend": backend}
    loss, metrics = weighted_policy_loss(leaf, *problem.positional[1:], **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0], metrics


def in_float64(problem: Problem) -> Problem:
    return replace(problem, **{name: t.double() for name, t in vars(problem).items() if isinstance(t, Tensor)})


def broken(tensor: Tensor, value: float) -> Tensor:
    """The tensor with a value in its second sample."""
    spoilt = tensor.clone()
    spoilt[1].view(-1)[-1:] = value
    return spoilt


@pytest.mark.parametrize("value", BROKEN, ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", ["image_odd", "packed"])
def test_a_non_finite_sample_of_the_policy_loss_affects_no_other(
    layout: str, ratio: str, value: float, policy_backend: tuple[str, str]
) -> None:
    backend, device = policy_backend
    problem = make(policy_backend, layout)
    options = {
        "weights": patch_weights(problem, list(problem.old_log_prob.shape[1:])),
        "step_weights": torch.ones(BATCH, device=device),
        "old_model_output": problem.old_model_output,
        "ref_model_output": 1.1 * problem.old_model_output,
        "kl_coef": 0.1,
        "ratio": ratio,
        "reduction": "none",
    }
    loss, gradient, _ = policy(problem, backend, **options)

    def check(spoilt: Problem, **changed: Any) -> None:
        got, its_gradient, _ = policy(spoilt, backend, **{**options, **changed})
        assert torch.equal(got[OTHERS], loss[OTHERS])
        assert torch.equal(its_gradient[OTHERS], gradient[OTHERS])
        if value != value:
            assert got[1].isnan()

    for name in ("model_output", "sample", "prev_sample", "old_log_prob", "advantages"):
        check(replace(problem, **{name: broken(getattr(problem, name), value)}))
    for name in ("step_weights", "old_model_output", "ref_model_output"):
        check(problem, **{name: broken(options[name], value)})
    table = broken(problem.transition.coefficients.T, value).T.contiguous()
    check(replace(problem, transition=Transition(table)))


@pytest.mark.parametrize("value", BROKEN, ids=str)
def test_a_non_finite_sample_of_the_nft_loss_affects_no_other(value: float, policy_backend: tuple[str, str]) -> None:
    backend, device = policy_backend
    problem = make(policy_backend)
    names = ("model_output", "old_model_output", "target", "advantages", "sigma", "step_weights", "ref_model_output")
    tensors = (
        problem.model_output,
        problem.old_model_output,
        problem.prev_sample,
        problem.advantages,
        SIGMA.to(device),
        torch.ones(BATCH, device=device),
        1.1 * problem.old_model_output,
    )

    def run(arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        leaf = arguments["model_output"].detach().requires_grad_()
        options = {"kl_coef": 0.1, "reduction": "none", "backend": backend}
        loss = weighted_nft_loss(**{**arguments, "model_output": leaf}, **options).loss
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    good = dict(zip(names, tensors, strict=True))
    loss, gradient = run(good)
    for name in names:
        got, its_gradient = run({**good, name: broken(good[name], value)})
        assert torch.equal(got[OTHERS], loss[OTHERS]), name
        assert torch.equal(its_gradient[OTHERS], gradient[OTHERS]), name
        if value != value:
            assert got[1].isnan(), name


@pytest.mark.parametrize("value", BROKEN, ids=str)
def test_a_non_finite_sample_does_not_affect_the_step_of_others(value: float, policy_backend: tuple[str, str]) -> None:
    backend, _ = policy_backend
    problem = make(policy_backend)
    latents = [problem.model_output, problem.sample, problem.prev_sample]

    def run(output: Tensor, sample: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return sample_transition(output, sample, problem.transition, noise=noise, backend=backend)

    clean = run(*latents)
    for i in range(3):
        results = run(*(broken(t, value) if i == j else t for j, t in enumerate(latents)))
        assert all(torch.equal(got[OTHERS], want[OTHERS]) for got, want in zip(results, clean, strict=True))
        assert not results[0][1].isfinite().all()


def test_weights_that_are_not_finite_are_an_error(policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend)
    if policy_backend[1] != "cpu":
        pytest.skip("values on a GPU are not looked at")
    for value in (*BROKEN, -1e-30):
        weights = broken(torch.ones_like(problem.old_log_prob), value)
        with pytest.raises(ValueError, match="weights must be finite and not negative"):
            policy(problem, policy_backend[0], weights=weights)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", [1e4, 1e-4, 1e-20])
def test_latents_of_any_size_keep_the_ratio_of_an_unchanged_model_at_one(
    size: float, ratio: str, policy_backend: tuple[str, str]
) -> None:
    backend, device = policy_backend
    base = make(policy_backend)
    transition = flow_sde(SIGMA, SIGMA / 2, sigma_max=0.95).to(device)
    output, sample = size * base.model_output, size * base.sample
    prev, old = sample_transition(output, sample, transition, noise=base.prev_sample, backend=backend)
    problem = Problem(output, sample, prev, old, base.advantages, transition, 1)
    loss, gradient, metrics = policy(problem, backend, ratio=ratio)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
    _, exact, _ = policy(in_float64(problem), "naive", ratio=ratio)
    # The next latent is a float32 of the latents' size, the residual that it carries of the noise's.
    close(gradient, exact, 1e-6 * max(1.0, 10 * size))
    assert float(loss) == pytest.approx(-float(problem.advantages.clamp(-5, 5).mean()), rel=1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_differences_too_small_for_a_normal_number_are_kept(ratio: str, policy_backend: tuple[str, str]) -> None:
    backend, device = policy_backend
    zeros = torch.zeros(1, 1, 1, 40, device=device)
    tiny = torch.full_like(zeros, 3e-41)
    transition = Transition(torch.tensor([[0.0], [1.0], [1.0], [0.5], [0.0], [1.0]], device=device))
    problem = Problem(tiny, zeros, zeros, zeros[:, 0], torch.ones(1, device=device), transition, 1)
    _, gradient, _ = policy(problem, backend, ratio=ratio)
    torch.testing.assert_close(gradient, tiny / 40, rtol=0, atol=3e-45)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shift", [-1e4, -200.0, -80.0, 80.0, 200.0, 1e4])
def test_ratios_beyond_the_range_of_float32_equal_the_reference(
    shift: float, ratio: str, policy_backend: tuple[str, str]
) -> None:
    problem = make(policy_backend)
    problem.advantages = torch.tensor([1.0, -1.0, 0.0, 2.0], device=policy_backend[1])
    problem.old_log_prob[:3] += shift
    loss, gradient, metrics = policy(problem, policy_backend[0], ratio=ratio, reduction="none")
    same_loss, same_gradient, same_metrics = policy(problem, "naive", ratio=ratio, reduction="none")
    torch.testing.assert_close(loss, same_loss, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(gradient, same_gradient, rtol=1e-3, atol=1e-6, equal_nan=True)
    assert torch.equal(metrics["ratio_max"].isinf(), same_metrics["ratio_max"].isinf())


ENDS = [(1.0, 0.9), (1.0, 0.0), (0.05, 0.0), (1e-3, 0.0), (0.5, 0.4999)]


@pytest.mark.parametrize(("sigma", "following"), ENDS)
@pytest.mark.parametrize("sampler", ["flow_sde", "flow_cps", "dance_sde"])
def test_a_step_at_either_end_of_the_schedule_equals_the_reference(
    sampler: str, sigma: float, following: float, policy_backend: tuple[str, str]
) -> None:
    backend, device = policy_backend
    made = {
        "flow_sde": lambda: flow_sde(sigma, following, sigma_max=0.95),
        "flow_cps": lambda: flow_cps(sigma, following),
        "dance_sde": lambda: dance_sde(sigma, following),
    }
    transition = made[sampler]().to(device)
    base = make(policy_backend)
    noise = base.prev_sample
    prev, old = sample_transition(base.old_model_output, base.sample, transition, noise=noise, backend=backend)
    assert bool(prev.isfinite().all())
    assert bool(old.isfinite().all())
    without_noise = sampler == "flow_cps" and following == 0
    if without_noise:
        again, _ = sample_transition(base.old_model_output, base.sample, transition, noise=-noise, backend=backend)
        assert torch.equal(prev, again)  # nothing is random
    problem = replace(base, prev_sample=prev, old_log_prob=old, transition=transition)
    drifted = replace(problem, model_output=base.old_model_output + (1.0 if without_noise else 0.01) * noise)
    for ratio in RATIOS:
        _, _, metrics = policy(replace(problem, model_output=base.old_model_output), backend, ratio=ratio)
        assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
        loss, gradient, _ = policy(drifted, backend, ratio=ratio)
        exact_loss, exact, _ = policy(in_float64(drifted), "naive", ratio=ratio)
        # log p is a difference of terms of its own size; of float32 that is what is left.
        error = 1e-4 if without_noise else 1e-6 * float(transition.scale.max().clamp(min=1)) ** 0.5
        assert float(loss) == pytest.approx(float(exact_loss), rel=error, abs=error)
        close(gradient, exact, 10 * error)


def test_terms_that_divide_by_the_noise_are_not_finite_without_it(policy_backend: tuple[str, str]) -> None:
    """The last step of Flow-CPS: the KL penalty and GRPO-Guard divide by the standard deviation of the noise."""
    backend, device = policy_backend
    base = make(policy_backend)
    transition = flow_cps(torch.tensor([0.5] * BATCH), torch.tensor([0.4, 0.0, 0.3, 0.2])).to(device)
    problem = replace(base, transition=transition)
    plain = policy(problem, backend, reduction="none")[0]
    assert bool(plain.isfinite().all())
    for options in ({"ref_model_output": base.sample, "kl_coef": 0.1}, {"old_model_output": base.old_model_output}):
        loss, _, _ = policy(problem, backend, reduction="none", **options)
        assert not loss[1].isfinite()
        assert bool(loss[OTHERS].isfinite().all())


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_ratio_on_the_edge_of_the_clip_range_is_inside_it(ratio: str, policy_backend: tuple[str, str]) -> None:
    backend, _ = policy_backend
    base = make(policy_backend)
    prev, old = sample_transition(
        base.model_output, base.sample, base.transition, noise=base.prev_sample, backend=backend
    )
    problem = replace(base, prev_sample=prev, old_log_prob=old)
    _, gradient, metrics = policy(problem, backend, ratio=ratio, clip_range=0.0)
    assert metrics["clip_fraction"] == 0
    assert torch.equal(gradient, policy(problem, backend, ratio=ratio)[1])


def test_the_largest_ratio_is_one_of_a_location_that_counts(policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend)
    problem.old_log_prob += 1.0
    mask = torch.rand(problem.old_log_prob.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    _, _, metrics = policy(problem, policy_backend[0], ratio="location", mask=mask.to(policy_backend[1]))
    assert 0.3 < float(metrics["ratio_max"]) < 0.7
