"""The options of ``weighted_policy_loss``: GRPO-Guard, masks, weights of steps and of the KL, losses of samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import (
    BATCH,
    LAYOUTS,
    RATIOS,
    SAMPLERS,
    SIGMA,
    SIGMA_NEXT,
    Problem,
    close,
    column,
    locations,
    log_density,
    make,
    patch_weights,
    upsampled,
)
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import sample_transition, weighted_policy_loss
from star_kernels.policy import naive
from star_kernels.policy.arguments import PolicyArguments

Options = dict[str, Any]


def run(problem: Problem, backend: tuple[str, str], upstream: Tensor | None = None, **options: Any) -> tuple:
    """Loss, gradient and metrics."""
    leaf = problem.model_output.detach().requires_grad_()
    loss, metrics = weighted_policy_loss(
        leaf, *problem.positional[1:], channel_dim=problem.channel_dim, backend=backend[0], **options
    )
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), gradient, metrics


def written(
    problem: Problem,
    *,
    ratio: str,
    clip_range: float,
    sampler: str = "flow_sde",
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    step_weights: Tensor | None = None,
    old_model_output: Tensor | None = None,
    ref_model_output: Tensor | None = None,
    kl_coef: float = 0.0,
    weighted_kl: bool = False,
) -> tuple[Tensor, Tensor]:
    """The objective in float64, sample by sample, over lists of the locations that count: loss [B] and gradient."""

    def wide(t: Tensor) -> Tensor:
        """[B, locations, C]"""
        return t.double().movedim(problem.channel_dim, -1).flatten(1, -2)

    v = problem.model_output.detach().double().requires_grad_()
    x, prev = problem.sample.double(), problem.prev_sample.double()
    log_prob, mean, s = log_density(sampler, v, x, prev)
    dt = column(SIGMA, x) - column(SIGMA_NEXT, x)
    means = {
        name: wide(log_density(sampler, t.double(), x, prev)[1])
        for name, t in (("old", old_model_output), ("reference", ref_model_output))
        if t is not None
    }
    log_prob, mean = wide(log_prob), wide(mean)
    old = problem.old_log_prob.double().flatten(1)
    losses = []
    for b in range(BATCH):
        kept = torch.ones_like(old[b], dtype=torch.bool) if mask is None else mask[b].flatten()
        weight = torch.ones_like(old[b]) if weights is None else weights[b].double().flatten()
        weight, std = weight[kept], (s * torch.sqrt(dt))[b].flatten()[0]
        delta = log_prob[b][kept].mean(dim=1) - old[b][kept]
        if old_model_output is not None:  # GRPO-Guard's RatioNorm
            delta = delta + ((mean[b] - means["old"][b])[kept] ** 2).mean(dim=1) / (2 * std**2)
        delta = (weight * delta).mean() if ratio == "sample" else delta
        rho = torch.exp(delta * std if old_model_output is not None else delta)
        advantage = problem.advantages[b].double().clamp(-5, 5)
        clipped = torch.clamp(rho, 1 - clip_range, 1 + clip_range)
        terms = torch.maximum(-advantage * rho, -advantage * clipped)
        loss = terms if ratio == "sample" else (weight * terms).mean()
        loss = loss if step_weights is None else loss * step_weights[b].double()
        if ref_model_output is not None:
            squared = ((mean[b] - means["reference"][b])[kept] ** 2).mean(dim=1) / (2 * s[b].flatten()[0] ** 2)
            loss = loss + kl_coef * ((weight * squared).mean() if weighted_kl else squared.mean())
        losses.append(loss)
    loss = torch.stack(losses)
    return loss.detach(), torch.autograd.grad(loss.mean(), v)[0]


def options_of(problem: Problem, name: str) -> Options:
    """The option of a name, with the arguments that it requires."""
    shape, device = list(problem.old_log_prob.shape), problem.sample.device
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask.flatten(1)[:, 0] = True
    reference = (problem.model_output + 0.1 * torch.randn(problem.sample.shape, generator=generator).to(device)).float()
    every: Options = {
        "weights": patch_weights(problem, shape[1:]),
        "mask": mask.to(device),
        "step_weights": torch.rand(BATCH, generator=generator).to(device) + 0.5,
        "old_model_output": problem.old_model_output,
        "ref_model_output": reference,
        "kl_coef": 0.04,
        "weighted_kl": True,
    }
    wanted = {
        "mask": ["mask"],
        "masked weights": ["mask", "weights"],
        "step weights": ["step_weights"],
        "guard": ["old_model_output"],
        "weighted guard": ["old_model_output", "weights", "step_weights"],
        "weighted KL": ["weights", "ref_model_output", "kl_coef", "weighted_kl"],
        "masked KL": ["mask", "ref_model_output", "kl_coef"],
        "all": list(every),
    }[name]
    return {option: every[option] for option in wanted}


WRITTEN = ["image", "image_odd", "packed", "packed_wide", "video", "channels_between"]
OPTIONS = ["mask", "masked weights", "step weights", "guard", "weighted guard", "weighted KL", "masked KL", "all"]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", mostly_exhaustive(WRITTEN, ["image_odd", "channels_between"]))
def test_loss_and_gradient_are_the_written_objective(
    layout: str, name: str, ratio: str, policy_backend: tuple[str, str], poisoned: None
) -> None:
    problem = make(policy_backend, layout, drift=0.01)
    options = options_of(problem, name)
    clip = 0.5 if ratio == "location" else 0.02
    exact_loss, exact_gradient = written(problem, ratio=ratio, clip_range=clip, **options)
    loss, gradient, metrics = run(problem, policy_backend, ratio=ratio, clip_range=clip, **options)
    assert float(loss) == pytest.approx(float(exact_loss.mean()), rel=3e-6, abs=3e-6)
    close(gradient, exact_gradient, 3e-6)
    assert all(bool(m.isfinite()) for m in metrics.values())
    each, same_gradient, same_metrics = run(
        problem, policy_backend, torch.full_like(exact_loss, 1 / BATCH).float(),
        ratio=ratio, clip_range=clip, reduction="none", **options,
    )  # fmt: skip
    assert each.shape == (BATCH,)
    torch.testing.assert_close(each.double(), exact_loss, rtol=3e-6, atol=1e-5)
    close(same_gradient, exact_gradient, 3e-6)
    assert all(torch.equal(metrics[key], same_metrics[key]) for key in metrics)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guard_makes_the_log_ratio_the_projection_of_the_change_on_the_noise(
    sampler: str, policy_backend: tuple[str, str]
) -> None:
    """For any sampler: log rho = mean((mean - mean_old) eps), with eps the sampled noise, of unit variance."""
    problem = make(policy_backend, sampler=sampler, drift=0.02)
    old = problem.old_model_output
    _, mean, _ = log_density(sampler, problem.model_output.double(), problem.sample.double(), problem.prev_sample)
    _, old_mean, _ = log_density(sampler, old.double(), problem.sample.double(), problem.prev_sample)
    std = column(problem.transition.std.cpu(), mean)
    noise = (problem.prev_sample.double() - old_mean) / std
    expected = torch.exp(((mean - old_mean) * noise).flatten(1).mean(dim=1))
    _, _, metrics = run(problem, policy_backend, old_model_output=old)
    assert float(metrics["ratio_mean"]) == pytest.approx(float(expected.mean()), abs=2e-6)
    assert float(metrics["ratio_max"]) == pytest.approx(float(expected.max()), abs=2e-6)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_guard_of_an_unchanged_model_has_a_ratio_of_exactly_one(
    dtype: torch.dtype, ratio: str, policy_backend: tuple[str, str]
) -> None:
    for layout in ("image_odd", "packed"):
        problem = make(policy_backend, layout, drift=0.0)
        output = problem.model_output.to(dtype)
        problem.prev_sample, problem.old_log_prob = sample_transition(
            output, problem.sample, problem.transition, channel_dim=problem.channel_dim, backend=policy_backend[0]
        )
        problem.model_output = output
        _, _, metrics = run(problem, policy_backend, ratio=ratio, old_model_output=output.clone())
        assert metrics["ratio_mean"] == metrics["ratio_max"] == 1


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", ["image_odd", "packed", "packed_wide", "video"])
def test_whatever_lies_under_the_mask_reaches_nothing(layout: str, ratio: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, layout, drift=0.01)
    options = options_of(problem, "all")
    mask = options["mask"]
    dropped = ~mask.unsqueeze(problem.channel_dim if problem.channel_dim > 0 else mask.ndim)
    loss, gradient, metrics = run(problem, policy_backend, ratio=ratio, clip_range=0.5, **options)

    def spoil(t: Tensor) -> Tensor:
        return t.masked_fill(dropped if t.ndim == dropped.ndim else ~mask, torch.nan)

    spoilt = replace(
        problem,
        model_output=spoil(problem.model_output),
        sample=spoil(problem.sample),
        prev_sample=spoil(problem.prev_sample),
        old_log_prob=spoil(problem.old_log_prob),
    )
    for name in ("old_model_output", "ref_model_output"):
        options[name] = spoil(options[name])
    same_loss, same_gradient, same_metrics = run(spoilt, policy_backend, ratio=ratio, clip_range=0.5, **options)
    assert torch.equal(loss, same_loss)
    assert torch.equal(gradient, same_gradient)
    assert not gradient.masked_select(dropped.expand_as(gradient)).any()
    assert all(torch.equal(metrics[name], same_metrics[name]) for name in metrics)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_mask_of_padding_gives_the_loss_of_the_shorter_latent(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, "packed")
    mask = torch.zeros(BATCH, 130, dtype=torch.bool, device=problem.sample.device)
    mask[:, :101] = True
    short = replace(
        problem,
        model_output=problem.model_output[:, :101],
        sample=problem.sample[:, :101],
        prev_sample=problem.prev_sample[:, :101],
        old_log_prob=problem.old_log_prob[:, :101],
    )
    loss, gradient, _ = run(problem, policy_backend, ratio=ratio, clip_range=0.5, mask=mask)
    short_loss, short_gradient, _ = run(short, policy_backend, ratio=ratio, clip_range=0.5)
    torch.testing.assert_close(loss, short_loss, rtol=1e-6, atol=1e-7)
    close(gradient[:, :101], short_gradient.double(), 1e-6)


def test_a_mask_of_all_locations_changes_nothing(policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, "image_odd")
    mask = torch.ones_like(problem.old_log_prob, dtype=torch.bool)
    for ratio in RATIOS:
        found = [run(problem, policy_backend, ratio=ratio, clip_range=0.5, mask=m) for m in (None, mask)]
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)
        close(found[1][1], found[0][1].double(), 1e-6)


def test_one_old_log_prob_a_sample_is_the_mean_over_the_mask(policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, "packed", drift=0.01)
    options = {**options_of(problem, "mask"), "old_model_output": problem.old_model_output, "clip_range": 0.5}
    loss, gradient, _ = run(problem, policy_backend, **options)
    mask = options["mask"]
    mean = (problem.old_log_prob.double() * mask).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1)
    scalar = replace(problem, old_log_prob=mean.float())
    same_loss, same_gradient, _ = run(scalar, policy_backend, **options)
    torch.testing.assert_close(same_loss, loss, rtol=3e-6, atol=3e-6)
    close(same_gradient, gradient.double(), 3e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_losses_of_samples_have_gradients_of_their_own(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, drift=0.01)
    options = {**options_of(problem, "all"), "ratio": ratio, "clip_range": 0.5, "reduction": "none"}
    device = problem.sample.device
    _, whole, _ = run(problem, policy_backend, torch.ones(BATCH, device=device), **options)
    for b in range(BATCH):
        upstream = torch.zeros(BATCH, device=device)
        upstream[b] = 2.0  # a power of two: exact
        _, gradient, _ = run(problem, policy_backend, upstream, **options)
        assert torch.equal(gradient[b], 2.0 * whole[b])
        assert not gradient[[i for i in range(BATCH) if i != b]].any()


def test_weights_of_the_kl_act_on_the_kl_alone(policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, drift=0.01)
    options = options_of(problem, "weighted KL")
    weighted, plain = (
        run(problem, policy_backend, clip_range=0.5, **{**options, "weighted_kl": flag})[2] for flag in (True, False)
    )
    assert torch.equal(weighted["policy_loss"], plain["policy_loss"])
    assert not torch.equal(weighted["kl_loss"], plain["kl_loss"])


def test_weights_on_a_patch_grid_equal_the_upsampled_ones_under_every_option(policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend)
    options = options_of(problem, "all")
    coarse = patch_weights(problem, [12, 10])
    fine = upsampled(coarse, locations(*LAYOUTS["image"]))
    for ratio in RATIOS:
        found = [
            run(problem, policy_backend, ratio=ratio, clip_range=0.5, **{**options, "weights": w})
            for w in (coarse, fine)
        ]
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("ratio", RATIOS)
def test_in_the_reference_a_sample_without_a_location_contributes_nothing(ratio: str) -> None:
    """On a CPU the public function refuses such a mask; on a GPU it does not read masks, and kernels must do this."""
    problem = make(("naive", "cpu"), "packed", drift=0.01)
    given = options_of(problem, "masked KL")
    given["mask"][1] = False
    leaf = problem.model_output.detach().requires_grad_()
    losses, metrics = naive.weighted_policy_loss(
        PolicyArguments(
            leaf,
            *problem.positional[1:5],
            coefficients=problem.transition.coefficients,
            weights=None,
            mask=given["mask"],
            step_weights=None,
            old_model_output=None,
            ref_model_output=given["ref_model_output"],
            channel_dim=2,
            per_location=ratio == "location",
            weighted_kl=False,
            unreduced=True,
            clip_low=0.5,
            clip_high=1.5,
            advantage_clip=5.0,
            kl_coef=0.04,
        )
    )
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses[1] == 0
    assert not gradient[1].any()
    others = [0, 2, 3]
    assert bool(losses[others].all())
    assert bool(gradient[others].flatten(1).any(dim=1).all())
    found = dict(zip(naive.METRICS, metrics.tolist(), strict=True))
    assert found["ratio_mean"] == pytest.approx(3 / 4, abs=0.1)  # of four samples, three count


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_of_the_reference(name: str, ratio: str) -> None:
    problem = make(("naive", "cpu"), "packed")
    problem = Problem(
        *(t[:, :5, :2].double() for t in (problem.model_output, problem.sample, problem.prev_sample)),
        problem.old_log_prob[:, :5].double() + 1.0,
        problem.advantages.double(),
        problem.transition,
        -1,
        problem.old_model_output[:, :5, :2].double(),
    )
    options = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
               for k, v in options_of(problem, name).items()}  # fmt: skip

    def loss(output: Tensor) -> Tensor:
        return weighted_policy_loss(
            output, *problem.positional[1:], channel_dim=-1, ratio=ratio, clip_range=(1.0, 1e9), reduction="none",
            **options,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, problem.model_output.requires_grad_())
