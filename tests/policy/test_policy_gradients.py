"""The gradient of ``weighted_policy_loss``: upstream factors, repeated passes, finite differences."""

from __future__ import annotations

import pytest
import torch
from problems import BATCH, RATIOS, SAMPLERS, close, make, run
from torch import Tensor

from star_kernels import sample_transition, weighted_policy_loss


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradient_scales_with_the_upstream_one(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend)
    options = {"ratio": ratio, "clip_range": 0.5, "kl_coef": 0.1, "ref_model_output": problem.model_output + 0.1}
    _, one, _ = run(problem, policy_backend, **options)
    for upstream in (0.0, -1.0, 0.25, 1024.0):  # powers of two: exact
        _, gradient, _ = run(problem, policy_backend, upstream=upstream, **options)
        assert torch.equal(gradient, upstream * one)
    _, gradient, _ = run(problem, policy_backend, upstream=1 / 3, **options)
    close(gradient, one.double() / 3, 1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_backward_twice_gives_the_same_gradient(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend)
    leaf = problem.model_output.clone().requires_grad_()
    loss, _ = weighted_policy_loss(
        leaf, *problem.positional[1:], ratio=ratio, clip_range=0.5, backend=policy_backend[0]
    )
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    second = torch.autograd.grad(loss, leaf)[0]
    assert torch.equal(first, second)


def test_the_gradient_goes_to_model_output_alone(policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend)
    leaves = [t.clone().requires_grad_() for t in problem.positional[:5]]
    weights, reference = (
        torch.ones_like(problem.old_log_prob).requires_grad_(),
        leaves[0].detach().clone().requires_grad_(),
    )
    options = {"weights": weights, "ref_model_output": reference, "kl_coef": 0.1, "backend": policy_backend[0]}
    weighted_policy_loss(*leaves, problem.transition, **options).loss.backward()
    assert leaves[0].grad is not None
    assert [t.grad for t in (*leaves[1:], weights, reference)] == [None] * 6
    fixed = weighted_policy_loss(problem.model_output, *problem.positional[1:], backend=policy_backend[0])
    assert not fixed.loss.requires_grad


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("with_kl", [True, False])
def test_gradcheck_of_the_reference(ratio: str, with_kl: bool) -> None:
    shape = (BATCH, 2, 4, 2)
    output, sample, prev, reference = torch.randn(4, *shape, dtype=torch.float64)
    transition = SAMPLERS["dance_sde"]()
    _, old = sample_transition(output, sample, transition, noise=torch.zeros_like(sample))
    prev = sample + 0.1 * prev
    old = torch.randn(BATCH, 4, 2, dtype=torch.float64) * 0.1
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    options = {"ref_model_output": reference, "kl_coef": 0.3} if with_kl else {}
    weights = torch.rand(BATCH, 2, 1, dtype=torch.float64)

    def loss(output: Tensor) -> Tensor:
        return weighted_policy_loss(
            output,
            sample,
            prev,
            old,
            advantages,
            transition,
            weights=weights,
            ratio=ratio,
            clip_range=(1.0, 1e6),
            **options,
        ).loss

    assert torch.autograd.gradcheck(loss, output.requires_grad_())
