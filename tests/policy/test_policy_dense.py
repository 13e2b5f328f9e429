"""Dense advantages: a signed one for each location."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import BATCH, LAYOUTS, RATIOS, SAMPLERS, Problem, close, locations, log_density, make, run
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import allocate, flow_sde, sample_transition, weighted_policy_loss


def with_dense(problem: Problem, seed: int = 5) -> tuple[Problem, Tensor]:
    """The problem with advantages ``[B, *locations]``, and weights of the same shape with mean one."""
    generator = torch.Generator().manual_seed(seed)
    size = locations(tuple(problem.model_output.shape), problem.channel_dim)
    advantages = torch.randn(BATCH, *size, generator=generator) * 4
    weights = torch.rand(BATCH, *size, generator=generator) + 0.1
    weights = weights / weights.flatten(1).mean(dim=1).view(-1, *[1] * len(size))
    device = problem.model_output.device
    return replace(problem, advantages=advantages.to(device)), weights.to(device)


def written(problem: Problem, weights: Tensor, ratio: str, clip: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64: sums of surrogates, and their slopes times the gradients of the log-ratios."""
    v = problem.model_output.detach().double().requires_grad_()
    log_prob, *_ = log_density("flow_sde", v, problem.sample.double(), problem.prev_sample.double())
    delta = log_prob.mean(dim=problem.channel_dim) - problem.old_log_prob.double()
    flat, w = delta.flatten(1), weights.double().flatten(1)
    advantages = problem.advantages.double().flatten(1).clamp(-5, 5)
    rho = torch.exp((w * flat).mean(dim=1, keepdim=True) if ratio == "sample" else flat).detach().expand_as(flat)
    free, clipped = -advantages * rho, -advantages * rho.clamp(1 - clip, 1 + clip)
    inside = (rho >= 1 - clip) & (rho <= 1 + clip)
    slopes = torch.where(inside | (free > clipped), free, 0.0)
    (gradient,) = torch.autograd.grad(delta, v, (w * slopes / w.numel()).view_as(delta))
    return (w * torch.maximum(free, clipped)).mean(), gradient


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", mostly_exhaustive(LAYOUTS, ["image_odd", "rows", "packed_wide", "one_position"]))
def test_loss_and_gradient_are_the_written_objective(
    layout: str, ratio: str, policy_backend: tuple[str, str], poisoned: None
) -> None:
    problem, weights = with_dense(make(policy_backend, layout, drift=0.01))
    clip = 0.3 if ratio == "location" else 0.02
    loss, gradient, metrics = run(problem, policy_backend, weights=weights, ratio=ratio, clip_range=clip)
    exact_loss, exact_gradient = written(problem, weights, ratio, clip)
    assert float(loss) == pytest.approx(float(exact_loss), rel=3e-6, abs=3e-6)
    close(gradient, exact_gradient, 3e-6)
    scalar = replace(problem, advantages=torch.ones_like(problem.advantages.flatten(1)[:, 0].contiguous()))
    _, _, same = run(scalar, policy_backend, weights=weights, ratio=ratio, clip_range=clip)
    for name in ("ratio_mean", "ratio_max", "clip_fraction", "approx_kl"):  # none depends on the advantages
        torch.testing.assert_close(metrics[name], same[name])


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_constant_advantage_is_that_of_the_sample(ratio: str, policy_backend: tuple[str, str]) -> None:
    scalar = make(policy_backend)
    _, weights = with_dense(scalar)
    dense = replace(scalar, advantages=scalar.advantages.view(-1, 1, 1).expand_as(scalar.old_log_prob))
    options: dict[str, Any] = {
        "weights": weights,
        "ratio": ratio,
        "clip_range": 0.02,
        "ref_model_output": scalar.sample,
        "kl_coef": 0.1,
        "weighted_kl": True,
        "old_model_output": scalar.old_model_output,
        "step_weights": torch.tensor([1.0, 0.5, 2.0, 0.0], device=weights.device),
    }
    loss, gradient, metrics = run(scalar, policy_backend, **options)
    same_loss, same_gradient, same_metrics = run(dense, policy_backend, **options)
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=1e-6)
    close(same_gradient, gradient.double(), 1e-5)
    for name, value in metrics.items():
        torch.testing.assert_close(same_metrics[name], value, rtol=1e-5, atol=1e-6)


def test_old_log_probabilities_of_samples(policy_backend: tuple[str, str]) -> None:
    problem, _ = with_dense(make(policy_backend))
    means = replace(problem, old_log_prob=problem.old_log_prob.flatten(1).mean(dim=1))
    loss, gradient, _ = run(problem, policy_backend, clip_range=0.02)
    same_loss, same_gradient, _ = run(means, policy_backend, clip_range=0.02)
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=1e-6)
    close(same_gradient, gradient.double(), 1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_advantages_are_clamped(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem, weights = with_dense(make(policy_backend))
    clamped = replace(problem, advantages=problem.advantages.clamp(-0.5, 0.5))
    found = [
        run(p, policy_backend, weights=weights, ratio=ratio, advantage_clip=limit)
        for p, limit in ((problem, 0.5), (clamped, 100.0))
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("ratio", RATIOS)
def test_locations_under_the_mask_reach_neither_loss_nor_gradient(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem, weights = with_dense(make(policy_backend, "image_odd"))
    mask = torch.rand(problem.advantages.shape).to(weights.device) < 0.7
    mask.flatten(1)[:, 0] = True
    options: dict[str, Any] = {"weights": weights, "mask": mask, "ratio": ratio, "clip_range": 0.02}
    loss, gradient, metrics = run(problem, policy_backend, **options)
    hidden = replace(problem, advantages=problem.advantages.masked_fill(~mask, torch.nan))
    same_loss, same_gradient, same_metrics = run(hidden, policy_backend, **options)
    assert torch.equal(same_loss, loss)
    assert torch.equal(same_gradient, gradient)
    assert all(torch.equal(metrics[name], same_metrics[name]) for name in metrics)
    assert not gradient.movedim(problem.channel_dim, -1)[~mask].any()


@pytest.mark.parametrize("ratio", RATIOS)
def test_nan_stays_visible_and_out_of_the_gradients_of_other_samples(
    ratio: str, policy_backend: tuple[str, str]
) -> None:
    problem, weights = with_dense(make(policy_backend))
    _, clean, _ = run(problem, policy_backend, weights=weights, ratio=ratio)
    problem.advantages[1, 2, 3] = torch.nan
    loss, gradient, _ = run(problem, policy_backend, weights=weights, ratio=ratio)
    assert loss.isnan()
    assert bool(gradient[1].isnan().any())
    assert torch.equal(gradient[[0, 2, 3]], clean[[0, 2, 3]])


def test_an_infinite_ratio_of_positive_advantages_is_clipped(policy_backend: tuple[str, str]) -> None:
    problem, weights = with_dense(make(policy_backend))
    problem.advantages = problem.advantages.abs() + 0.1
    problem.old_log_prob[0] -= 200.0  # the ratio overflows
    loss, gradient, _ = run(problem, policy_backend, weights=weights, clip_range=0.2)
    assert bool(loss.isfinite())
    assert not gradient[0].any()
    assert bool(gradient[1:].isfinite().all())


def test_gradcheck_of_the_reference() -> None:
    """With ratios of locations; those of samples have by design no value whose gradient they are."""
    generator = torch.Generator().manual_seed(0)
    output, sample, prev = torch.randn(3, BATCH, 2, 3, 2, generator=generator, dtype=torch.float64)
    transition = SAMPLERS["flow_sde"]()
    weights = torch.rand(BATCH, 3, 2, generator=generator, dtype=torch.float64)
    advantages = torch.randn(BATCH, 3, 2, generator=generator, dtype=torch.float64)
    _, old = sample_transition(output, sample, transition, noise=torch.zeros_like(sample))

    def loss(v: Tensor) -> Tensor:
        return weighted_policy_loss(
            v, sample, sample + 0.1 * prev, old, advantages, transition, weights=weights, ratio="location",
            clip_range=(1.0, 1e6), kl_coef=0.1, weighted_kl=True, ref_model_output=sample,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, output.requires_grad_())


def test_allocations_weigh_dense_advantages_on_the_grid_of_patches(policy_backend: tuple[str, str]) -> None:
    problem, _ = with_dense(make(policy_backend))
    generator = torch.Generator().manual_seed(1)
    coarse = allocate(torch.rand(BATCH, 12, 10, generator=generator), layout="bhw").to(problem.sample.device)
    fine = coarse.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    found = [run(problem, policy_backend, weights=w, clip_range=0.02) for w in (coarse, fine)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("advantages", "message"),
    [
        (
            torch.ones(2, 6, 4),
            r"\[B, \*locations\] = \[2, 6, 8\], or \[B, G\] with weights .*got advantages \[2, 6, 4\]",
        ),
        (torch.ones(2, 4, 6, 8), r"advantages must have shape \[B\] = \[2\].*got advantages \[2, 4, 6, 8\]"),
        (torch.ones(1, 6, 8), r"got advantages \[1, 6, 8\] and weights None"),
        (torch.ones(2, 48), r"got advantages \[2, 48\]"),
    ],
)
def test_dense_advantages_that_do_not_fit(advantages: Tensor, message: str) -> None:
    latent = torch.zeros(2, 4, 6, 8)
    with pytest.raises(ValueError, match=message):
        weighted_policy_loss(
            latent, latent, latent, torch.zeros(2, 6, 8), advantages, flow_sde(0.9, 0.8, sigma_max=0.95)
        )
