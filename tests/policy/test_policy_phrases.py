"""Advantages of phrases: each acts by its own weights, ratio and clip; the loss is their sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import BATCH, LAYOUTS, RATIOS, SAMPLERS, Problem, close, locations, make, run
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import Transition, allocate, weighted_policy_loss

PHRASES = 3


def with_phrases(problem: Problem, phrases: int = PHRASES) -> tuple[Problem, Tensor]:
    """The problem with advantages ``[B, G]``, and weights ``[B, G, *locations]``."""
    generator = torch.Generator().manual_seed(3)
    size = locations(tuple(problem.model_output.shape), problem.channel_dim)
    maps = torch.rand(BATCH, phrases, *size, generator=generator) ** 3
    weights = allocate(maps, layout=("bgp", "bghw", "bgfhw")[len(size) - 1])
    advantages = torch.randn(BATCH, phrases, generator=generator) * 4
    device = problem.model_output.device
    return replace(problem, advantages=advantages.to(device)), weights.to(device)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", mostly_exhaustive(LAYOUTS, ["image_odd", "rows", "packed_wide"]))
def test_the_loss_is_the_sum_over_phrases_with_one_penalty(
    layout: str, ratio: str, policy_backend: tuple[str, str]
) -> None:
    problem, weights = with_phrases(make(policy_backend, layout))
    shape = problem.model_output.shape
    mask = torch.rand(BATCH, *locations(tuple(shape), problem.channel_dim)) < 0.8
    mask.flatten(1)[:, 0] = True
    shared: dict[str, Any] = {
        "ratio": ratio,
        "clip_range": 0.02,
        "mask": mask.to(weights.device),
        "old_model_output": problem.old_model_output,
        "step_weights": torch.tensor([1.0, 0.5, 2.0, 0.0], device=weights.device),
    }
    penalty: dict[str, Any] = {"ref_model_output": problem.sample, "kl_coef": 0.04}
    loss, gradient, metrics = run(problem, policy_backend, weights=weights, **shared, **penalty)
    parts = [
        run(
            replace(problem, advantages=problem.advantages[:, g]),
            policy_backend,
            weights=weights[:, g],
            **shared,
            **(penalty if g == 0 else {}),
        )
        for g in range(PHRASES)
    ]
    assert float(loss) == pytest.approx(sum(float(part[0]) for part in parts), rel=1e-6, abs=1e-6)
    close(gradient, sum(part[1].double() for part in parts), 1e-6)
    for name, value in metrics.items():
        values = torch.stack([part[2][name] for part in parts])
        expected = {"ratio_max": values.amax(), "policy_loss": values.sum(), "kl_loss": values[0]}
        torch.testing.assert_close(value, expected.get(name, values.mean()), rtol=1e-5, atol=1e-6)
    assert float(metrics["kl_loss"]) > 0


@pytest.mark.parametrize("ratio", RATIOS)
def test_one_phrase_is_the_loss_without_phrases_to_the_last_bit(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem, weights = with_phrases(make(policy_backend), phrases=1)
    loss, gradient, metrics = run(problem, policy_backend, weights=weights, ratio=ratio)
    plain = replace(problem, advantages=problem.advantages[:, 0])
    same_loss, same_gradient, same_metrics = run(plain, policy_backend, weights=weights[:, 0], ratio=ratio)
    assert torch.equal(loss, same_loss)
    assert torch.equal(gradient, same_gradient)
    assert all(torch.equal(metrics[name], same_metrics[name]) for name in metrics)


def test_an_advantage_of_zero_removes_a_phrase(policy_backend: tuple[str, str]) -> None:
    problem, weights = with_phrases(make(policy_backend))
    problem.advantages[1, 2] = problem.advantages[3, 0] = 0
    loss, gradient, _ = run(problem, policy_backend, weights=weights)
    other = weights.clone()
    grid = other[1, 2]
    other[1, 2] = other[3, 0] = allocate(torch.rand(1, grid.numel())).view_as(grid)
    same_loss, same_gradient, _ = run(problem, policy_backend, weights=other)
    assert torch.equal(loss, same_loss)
    assert torch.equal(gradient, same_gradient)


def test_weights_on_the_grid_of_patches_and_a_loss_of_each_sample(policy_backend: tuple[str, str]) -> None:
    problem, _ = with_phrases(make(policy_backend))
    coarse = torch.rand(BATCH, PHRASES, 12, 10, device=problem.model_output.device)
    fine = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    losses = [
        weighted_policy_loss(*problem.positional, weights=weights, reduction="none", backend=policy_backend[0]).loss
        for weights in (coarse, fine, fine.transpose(2, 3).contiguous().transpose(2, 3))
    ]
    assert losses[0].shape == (BATCH,)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradcheck_of_the_reference(ratio: str) -> None:
    generator = torch.Generator().manual_seed(0)
    output, sample, prev = torch.randn(3, BATCH, 2, 3, 2, generator=generator, dtype=torch.float64)
    transition = SAMPLERS["flow_sde"]()
    weights = torch.rand(BATCH, PHRASES, 3, 2, generator=generator, dtype=torch.float64)
    advantages = torch.randn(BATCH, PHRASES, generator=generator, dtype=torch.float64)
    old = torch.full((BATCH, 3, 2), -1.0, dtype=torch.float64)

    def loss(v: Tensor) -> Tensor:
        return weighted_policy_loss(
            v, sample, prev, old, advantages, transition, weights=weights, ratio=ratio, clip_range=0.5, kl_coef=0.1,
            ref_model_output=sample,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, output.requires_grad_())


FIELD = torch.ones(2, 3, 6, 8)
PHRASE_ERRORS = [
    ({"weights": None}, r"advantages must have shape \[B\] = \[2\], \[B, \*locations\] = \[2, 6, 8\], or .*got .*None"),
    (
        {"weights": FIELD, "advantages": torch.ones(2, 1)},
        r"advantages must have shape \[B, G\] = \[2, 3\] with weights .*got advantages \[2, 1\] and .*\[2, 3, 6, 8\]",
    ),
    (
        {"weights": FIELD[:, 0]},
        r"advantages must .*or \[B, G\] with weights .*got advantages \[2, 3\] and .*\[2, 6, 8\]",
    ),
    (
        {"weights": FIELD[:, :2]},
        r"advantages must have shape \[B, G\] = \[2, 2\] with weights .*got advantages \[2, 3\] and .*\[2, 2, 6, 8\]",
    ),
    ({"weights": FIELD[:, :0]}, r"weights must have at least one phrase, got \[2, 0, 6, 8\]"),
    ({"weights": torch.ones(2, 3, 4, 8)}, r"coarser grid that divides it, got \[2, 3, 4, 8\]"),
    ({"weights": FIELD.double()}, r"weights must be float32 .*got torch.float64"),
    (
        {"advantages": torch.ones(2)},
        r"advantages must have shape \[B, G\] = \[2, 3\] with weights .*got .*with advantages \[B\] weights are",
    ),
    ({"advantages": torch.ones(2, 6, 8)}, r"advantages must have shape \[B, G\].*got advantages \[2, 6, 8\]"),
    ({"advantages": torch.ones(1, 3)}, r"advantages must have shape \[B, G\] = \[2, 3\].*got advantages \[1, 3\]"),
    ({"advantages": torch.ones(2, 0)}, r"advantages must have shape \[B, G\] = \[2, 3\].*got advantages \[2, 0\]"),
    ({"weighted_kl": True}, r"weighted_kl must be False with weights \[B, G, \*locations\].*got True"),
    ({"weights": -FIELD}, "weights must.*negative"),
]


@pytest.mark.parametrize(("change", "message"), PHRASE_ERRORS)
@pytest.mark.parametrize("backend", ["naive", "auto"])
def test_phrases_that_do_not_fit(change: dict[str, Any], message: str, backend: str) -> None:
    latent = torch.zeros(2, 4, 6, 8)
    transition = SAMPLERS["flow_sde"]()
    halved = Transition(transition.coefficients[:, :2])
    arguments = {"advantages": torch.ones(2, 3), "weights": FIELD, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        weighted_policy_loss(
            latent, latent, latent, torch.zeros(2, 6, 8), transition=halved, backend=backend, **arguments
        )


def test_the_dimensions_of_the_weights_decide_between_phrases_and_locations(policy_backend: tuple[str, str]) -> None:
    """Packed latents with as many phrases as locations: [B, G] and [B, S] are the same shape."""
    problem = make(policy_backend, "packed_wide")
    size = problem.model_output.shape[1]
    advantages = torch.linspace(-1, 1, BATCH * size, device=problem.advantages.device).view(BATCH, size)
    problem = replace(problem, advantages=advantages)
    eye = torch.eye(size, device=advantages.device).expand(BATCH, size, size)  # phrase g acts at location g alone
    options: dict[str, Any] = {"ratio": "location", "clip_range": 0.2}
    dense = run(problem, policy_backend, **options)
    phrases = run(problem, policy_backend, weights=eye, **options)
    torch.testing.assert_close(phrases[0], dense[0], rtol=1e-6, atol=1e-7)
    close(phrases[1], dense[1].double(), 1e-6)
    assert not torch.allclose(run(problem, policy_backend, weights=eye)[0], run(problem, policy_backend)[0])
