"""Properties of the objectives and of the sampling step that docs/method.md states, for random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import BATCH, LAYOUTS, RATIOS, SAMPLERS, Problem, close, locations, make, patch_weights
from torch import Tensor

from star_kernels import Transition, allocate, sample_transition, weighted_nft_loss, weighted_policy_loss

ORDER = torch.tensor([2, 0, 3, 1])
WIDE_OPEN = {"clip_range": 0.5, "advantage_clip": 100.0}


def policy(problem: Problem, backend: tuple[str, str], **options: Any) -> tuple[Tensor, Tensor]:
    """Losses of the samples, and the gradient of their sum."""
    leaf = problem.model_output.detach().requires_grad_()
    options = {**WIDE_OPEN, **options, "reduction": "none", "channel_dim": problem.channel_dim, "backend": backend[0]}
    loss = weighted_policy_loss(leaf, *problem.positional[1:], **options).loss
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def nft(problem: Problem, backend: tuple[str, str], **options: Any) -> tuple[Tensor, Tensor]:
    """The same for DiffusionNFT's loss: the old model generated the samples, and the next latent is the target."""
    leaf = problem.model_output.detach().requires_grad_()
    sigma = torch.linspace(0.9, 0.3, BATCH, device=leaf.device)
    if "order" in options:
        sigma = sigma[options.pop("order")]
    options = {**options, "reduction": "none", "channel_dim": problem.channel_dim, "backend": backend[0]}
    loss = weighted_nft_loss(
        leaf, problem.old_model_output, problem.prev_sample, problem.advantages, sigma, **options
    ).loss
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def reordered(problem: Problem) -> Problem:
    tensors = {name: value[ORDER] for name, value in vars(problem).items() if isinstance(value, Tensor)}
    return replace(problem, **tensors, transition=Transition(problem.transition.coefficients[:, ORDER]))


def options_of(problem: Problem) -> dict[str, Any]:
    shape = list(problem.old_log_prob.shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    mask.flatten(1)[:, 0] = True
    device = problem.sample.device
    return {
        "weights": patch_weights(problem, shape[1:]),
        "mask": mask.to(device),
        "step_weights": torch.tensor([0.5, 1.0, 1.5, 2.0], device=device),
        "ref_model_output": problem.old_model_output * 1.1,
        "kl_coef": 0.1,
        "weighted_kl": True,
    }


@pytest.mark.parametrize("objective", ["sample", "location", "nft"])
@pytest.mark.parametrize("layout", ["image_odd", "packed", "channels_between"])
def test_samples_are_independent(layout: str, objective: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, layout)
    options = options_of(problem)
    moved = {name: value[ORDER] if isinstance(value, Tensor) else value for name, value in options.items()}
    if objective == "nft":
        loss, gradient = nft(problem, policy_backend, **options)
        same_loss, same_gradient = nft(reordered(problem), policy_backend, order=ORDER, **moved)
    else:
        options["old_model_output"] = problem.old_model_output
        moved["old_model_output"] = problem.old_model_output[ORDER]
        loss, gradient = policy(problem, policy_backend, ratio=objective, **options)
        same_loss, same_gradient = policy(reordered(problem), policy_backend, ratio=objective, **moved)
    assert torch.equal(same_loss, loss[ORDER])
    assert torch.equal(same_gradient, gradient[ORDER])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_of_a_batch_equals_the_steps_of_its_samples(layout: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, layout)
    shape, channel_dim = LAYOUTS[layout]
    noise = torch.randn(shape).to(policy_backend[1])
    options = {"channel_dim": channel_dim, "backend": policy_backend[0]}
    together = sample_transition(problem.model_output, problem.sample, problem.transition, noise=noise, **options)
    for b in range(BATCH):
        transition = Transition(problem.transition.coefficients[:, b : b + 1])
        latents = (t[b : b + 1] for t in (problem.model_output, problem.sample))
        alone = sample_transition(*latents, transition, noise=noise[b : b + 1], **options)
        assert all(torch.equal(one[0], whole[b]) for one, whole in zip(alone, together, strict=True))


def assert_as_contiguous(view: Callable[[Tensor], Tensor], problem: Problem, policy_backend: tuple[str, str]) -> None:
    """Views of the latents give the results of their copies."""
    options = {"channel_dim": problem.channel_dim, "backend": policy_backend[0]}
    found = []
    for made in (view, lambda t: view(t).contiguous()):
        latents = [made(t) for t in (problem.model_output, problem.sample)]
        drawn = sample_transition(*latents, problem.transition, noise=problem.prev_sample, **options)
        moved = replace(problem, model_output=latents[0], sample=latents[1])
        found.append([*drawn, *policy(moved, policy_backend), *nft(moved, policy_backend)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (3,), (1, 3), (2, 3), (0, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("layout", ["image_odd", "channels_innermost", "channels_between"])
def test_expanded_latents_equal_their_copies(
    layout: str, dims: tuple[int, ...], policy_backend: tuple[str, str]
) -> None:
    problem = make(policy_backend, layout)

    def expanded(t: Tensor) -> Tensor:
        return t[tuple(slice(0, 1) if d in dims else slice(None) for d in range(t.ndim))].expand(t.shape)

    assert_as_contiguous(expanded, problem, policy_backend)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("layout", ["image_odd", "channels_innermost"])
def test_latents_that_overlap_in_memory_equal_their_copies(
    layout: str, step: int, policy_backend: tuple[str, str]
) -> None:
    problem = make(policy_backend, layout)

    def overlapping(t: Tensor) -> Tensor:
        """Channels that are windows of one signal, each ``step`` elements after the last."""
        first = t.movedim(problem.channel_dim, 1)
        strides = list(first[:, 0].contiguous().stride())
        return t.flatten().as_strided(first.shape, [strides[0], step, *strides[1:]]).movedim(1, problem.channel_dim)

    assert_as_contiguous(overlapping, problem, policy_backend)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("layout", ["image", "packed"])
def test_on_policy_weights_multiply_the_gradient_of_flow_grpo(
    layout: str, sampler: str, policy_backend: tuple[str, str]
) -> None:
    """For both ratios: the sign of the advantage never flips, and a location of weight zero has no gradient."""
    problem = make(policy_backend, layout, sampler, drift=0.0)
    weights = patch_weights(problem, locations(*LAYOUTS[layout]))
    _, plain = policy(problem, policy_backend)
    channels = problem.channel_dim % plain.ndim
    for ratio in RATIOS:
        loss, gradient = policy(problem, policy_backend, ratio=ratio, weights=weights)
        close(gradient, (weights.unsqueeze(channels) * plain).double(), 1e-5)
        assert bool((gradient * plain >= 0).all())
        assert not gradient.masked_select((weights == 0).unsqueeze(channels).expand_as(gradient)).any()
        # Mean one: the weights move the budget and do not change it.
        torch.testing.assert_close(loss, -problem.advantages, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_gradient_is_linear_in_the_advantages(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, drift=1e-3)
    weights = patch_weights(problem, [24, 20])
    _, one = policy(problem, policy_backend, ratio=ratio, weights=weights)
    for factor in (2.0, -1.0, 0.25, 0.0):  # exact in binary
        scaled = replace(problem, advantages=factor * problem.advantages)
        _, gradient = policy(scaled, policy_backend, ratio=ratio, weights=weights)
        assert torch.equal(gradient, factor * one)


@pytest.mark.parametrize("objective", ["sample", "location", "nft"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_allocation_of_strength_zero_is_the_plain_loss_bit_by_bit(
    layout: str, objective: str, policy_backend: tuple[str, str]
) -> None:
    problem = make(policy_backend, layout)
    size = locations(*LAYOUTS[layout])
    weights = allocate(torch.rand(BATCH, torch.Size(size).numel()), strength=0.0).view(BATCH, *size)
    weights = weights.to(policy_backend[1])
    for given in ({}, {"mask": options_of(problem)["mask"]}):
        if objective == "nft":
            found = [nft(problem, policy_backend, **given, **w) for w in ({}, {"weights": weights})]
        else:
            found = [policy(problem, policy_backend, ratio=objective, **given, **w) for w in ({}, {"weights": weights})]
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
