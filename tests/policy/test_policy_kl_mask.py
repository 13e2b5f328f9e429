"""``kl_mask_threshold`` of ``weighted_policy_loss``: Flow-DPPO's mask of the divergence in place of the clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import BATCH, RATIOS, Problem, close, log_density, make, patch_weights
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import weighted_policy_loss

Options = dict[str, Any]
CREDITS = ["plain", "weights", "dense", "phrases"]
LAYOUTS = ["image_odd", "packed", "image", "packed_wide", "video", "channels_between"]
METRICS = ("ratio_mean", "ratio_max", "clip_fraction", "approx_kl", "kl_new_old_mean", "policy_loss", "kl_loss")


def drifted(backend: tuple[str, str], layout: str, credit: str = "plain", **options: Any) -> tuple[Problem, Options]:
    """A problem whose samples have moved away by different amounts, and its options."""
    problem = make(backend, layout, drift=0.05, **options)
    old = problem.old_model_output
    moved = torch.tensor([1.0, 0.1, 0.5, 1.5], device=old.device).view(-1, *[1] * (old.ndim - 1))
    problem.model_output = old + moved * (problem.model_output - old)
    shape = list(problem.old_log_prob.shape)
    generator = torch.Generator().manual_seed(5)
    given: Options = {"old_model_output": old}
    if credit == "dense":
        problem.advantages = torch.randn(shape, generator=generator).to(old.device)
    elif credit == "phrases":
        problem.advantages = torch.randn(BATCH, 3, generator=generator).to(old.device)
    if credit in ("weights", "dense"):
        given["weights"] = patch_weights(problem, shape[1:])
    elif credit == "phrases":
        given["weights"] = torch.rand(BATCH, 3, *shape[1:], generator=generator).to(old.device)
    return problem, given


def written(
    problem: Problem, threshold: float, ratio: str, options: Options, sampler: str = "flow_sde"
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The published objective in float64, sample by sample: losses [B], gradient and metrics.

    ``kl = mean((mean - mean_old)^2 / (2 sigma^2))`` of a sample; the loss ``-A rho`` is dropped where kl is at least
    the threshold and either rho > 1 and A > 0, or rho < 1 and A < 0. With advantages or ratios of locations each
    location is a sample of its own; dense advantages share the value of a ratio of the sample.
    """

    def wide(t: Tensor) -> Tensor:
        return t.double().movedim(problem.channel_dim, -1).flatten(1, -2)

    v = problem.model_output.detach().double().requires_grad_()
    x, prev = problem.sample.double(), problem.prev_sample.double()
    log_prob, mean, _ = log_density(sampler, v, x, prev)
    _, old_mean, _ = log_density(sampler, options["old_model_output"].double(), x, prev)
    change = wide(mean - old_mean).detach().square()
    delta = wide(log_prob).mean(dim=2) - problem.old_log_prob.double().flatten(1)
    losses, ratios, divergences = [], [], []
    for b in range(BATCH):
        keep = options["mask"][b].flatten() if "mask" in options else torch.ones_like(delta[b], dtype=torch.bool)
        kl = (change[b][keep] / (2 * problem.transition.std[b].double() ** 2)).mean(dim=1)
        weights = options.get("weights")
        weights = torch.ones_like(delta[b])[None] if weights is None else weights[b].double().flatten(-delta.ndim + 1)
        weights = weights.reshape(-1, delta.shape[1])[:, keep]  # [phrases, locations]
        advantages = problem.advantages[b].double().clamp(-5, 5)
        dense = advantages.ndim > 0 and "phrases" not in options.get("kind", "")
        advantages = advantages.flatten()[keep][None] if dense else advantages.reshape(-1, 1)
        own = delta[b][keep][None]
        if ratio == "sample":
            kl = kl.mean(dim=0, keepdim=True)
            log_ratio = (weights * own).mean(dim=1, keepdim=True)
            acting = log_ratio.detach() + own - own.detach() if dense else log_ratio
            factor = weights if dense else torch.ones_like(acting)
        else:
            log_ratio = acting = own
            factor = weights
        rho = acting.exp()
        further = ((rho > 1) & (advantages > 0)) | ((rho < 1) & (advantages < 0))
        terms = torch.where((kl >= threshold) & further, 0.0, -advantages * rho)
        losses.append((factor * terms).mean(dim=1).sum())
        ratios.append(log_ratio.detach().exp())
        divergences.append(kl)
    loss = torch.stack(losses)
    gradient = torch.autograd.grad(loss.mean(), v)[0]
    metrics = {
        "ratio_mean": sum(float(r.mean()) for r in ratios) / BATCH,
        "ratio_max": max(float(r.max()) for r in ratios),
        "clip_fraction": sum(float((kl >= threshold).double().mean()) for kl in divergences) / BATCH,
        "kl_new_old_mean": sum(float(kl.mean()) for kl in divergences) / BATCH,
    }
    return loss.detach(), gradient, metrics


def run(
    problem: Problem, backend: tuple[str, str], threshold: float, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaf = problem.model_output.detach().requires_grad_()
    loss, metrics = weighted_policy_loss(
        leaf, *problem.positional[1:], channel_dim=problem.channel_dim, backend=backend[0],
        kl_mask_threshold=threshold, **options,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), gradient, metrics


def masked(problem: Problem, options: Options) -> Options:
    mask = torch.rand(problem.old_log_prob.shape, generator=torch.Generator().manual_seed(3)) < 0.7
    mask.flatten(1)[:, 0] = True
    return {**options, "mask": mask.to(problem.sample.device)}


def threshold_of(problem: Problem, options: Options, ratio: str) -> float:
    """A threshold that some of the divergences reach, and some do not, at a distance from all of them."""
    _, _, metrics = run(problem, ("naive", ""), 1.0, ratio=ratio, **options)
    return 0.5 * float(metrics["kl_new_old_mean"])


@pytest.mark.parametrize("masking", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("layout", mostly_exhaustive(LAYOUTS, LAYOUTS[:2]))
def test_loss_and_gradient_are_the_published_ones(
    layout: str, credit: str, ratio: str, masking: bool, policy_backend: tuple[str, str], poisoned: None
) -> None:
    problem, options = drifted(policy_backend, layout, credit)
    options = masked(problem, options) if masking else options
    threshold = threshold_of(problem, options, ratio)
    kind = {"kind": credit}
    exact_loss, exact_gradient, exact_metrics = written(problem, threshold, ratio, options | kind)
    assert 0 < exact_metrics["clip_fraction"] < 1
    loss, gradient, metrics = run(problem, policy_backend, threshold, ratio=ratio, **options)
    assert float(loss) == pytest.approx(float(exact_loss.mean()), rel=3e-6, abs=3e-6)
    close(gradient, exact_gradient, 3e-6)
    assert set(metrics) == set(METRICS)
    for name, value in exact_metrics.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    each, same_gradient, _ = run(
        problem, policy_backend, threshold, torch.full_like(exact_loss, 1 / BATCH).float(),
        ratio=ratio, reduction="none", **options,
    )  # fmt: skip
    torch.testing.assert_close(each.double(), exact_loss, rtol=3e-6, atol=1e-5)
    close(same_gradient, exact_gradient, 3e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_values_under_the_mask_reach_nothing(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem, options = drifted(policy_backend, "image_odd", "dense")
    options = masked(problem, options)
    threshold = threshold_of(problem, options, ratio)
    loss, gradient, metrics = run(problem, policy_backend, threshold, ratio=ratio, **options)
    dropped = ~options["mask"]

    def spoil(t: Tensor) -> Tensor:
        return t.masked_fill(dropped.unsqueeze(1) if t.ndim > dropped.ndim else dropped, torch.nan)

    spoilt = replace(
        problem,
        **{n: spoil(getattr(problem, n)) for n in ("model_output", "sample", "prev_sample", "old_log_prob")},
        advantages=spoil(problem.advantages),
    )
    options["old_model_output"] = spoil(options["old_model_output"])
    same_loss, same_gradient, same = run(spoilt, policy_backend, threshold, ratio=ratio, **options)
    assert torch.equal(loss, same_loss)
    assert torch.equal(gradient, same_gradient)
    assert all(torch.equal(metrics[name], same[name]) for name in metrics)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_threshold_that_nothing_reaches_leaves_an_unclipped_ratio(
    ratio: str, policy_backend: tuple[str, str]
) -> None:
    problem, options = drifted(policy_backend, "packed", "weights")
    loss, gradient, metrics = run(problem, policy_backend, 1e9, ratio=ratio, **options)
    leaf = problem.model_output.detach().requires_grad_()
    del options["old_model_output"]
    free = weighted_policy_loss(
        leaf, *problem.positional[1:], channel_dim=-1, clip_range=(1.0, 1e30), ratio=ratio, backend=policy_backend[0],
        **options,
    ).loss  # fmt: skip
    torch.testing.assert_close(loss, free.detach(), rtol=1e-6, atol=0.0)
    close(gradient, torch.autograd.grad(free, leaf)[0].double(), 1e-6)
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_ratio_that_overflows_has_no_gradient_where_it_is_masked(ratio: str, policy_backend: tuple[str, str]) -> None:
    for credit in CREDITS:
        problem, options = drifted(policy_backend, "image_odd", credit)
        problem = replace(problem, old_log_prob=problem.old_log_prob - 400, advantages=problem.advantages.abs())
        loss, gradient, _ = run(problem, policy_backend, 1e-12, ratio=ratio, **options)
        assert loss == 0
        assert not gradient.any()
        idle = replace(problem, advantages=torch.zeros_like(problem.advantages))
        loss, gradient, _ = run(idle, policy_backend, 1e9, ratio=ratio, **options)
        assert loss == 0
        assert not gradient.any()


@pytest.mark.parametrize("sampler", ["flow_cps", "dance_sde"])
def test_the_divergence_is_that_of_the_samplers_noise(sampler: str, policy_backend: tuple[str, str]) -> None:
    problem, options = drifted(policy_backend, "image_odd", sampler=sampler)
    threshold = threshold_of(problem, options, "sample")
    exact_loss, exact_gradient, exact = written(problem, threshold, "sample", options, sampler)
    loss, gradient, metrics = run(problem, policy_backend, threshold, **options)
    assert float(loss) == pytest.approx(float(exact_loss.mean()), rel=3e-6, abs=3e-6)
    close(gradient, exact_gradient, 3e-6)
    assert float(metrics["kl_new_old_mean"]) == pytest.approx(exact["kl_new_old_mean"], rel=1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_strided_and_half_precision_inputs(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem, options = drifted(policy_backend, "image_odd", "weights")
    threshold = threshold_of(problem, options, ratio)
    loss, gradient, _ = run(problem, policy_backend, threshold, ratio=ratio, **options)

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]

    moved = replace(problem, model_output=strided(problem.model_output), sample=strided(problem.sample))
    options = {**options, "old_model_output": strided(options["old_model_output"])}
    same_loss, same_gradient, _ = run(moved, policy_backend, threshold, ratio=ratio, **options)
    torch.testing.assert_close(loss, same_loss, rtol=1e-6, atol=1e-7)
    close(same_gradient, gradient.double(), 1e-6)
    half = replace(problem, model_output=problem.model_output.bfloat16())
    options = {**options, "old_model_output": options["old_model_output"].bfloat16()}
    threshold = threshold_of(half, options, ratio)
    exact_loss, exact_gradient, _ = written(half, threshold, ratio, options)
    loss, gradient, _ = run(half, policy_backend, threshold, ratio=ratio, **options)
    assert gradient.dtype == torch.bfloat16
    assert float(loss) == pytest.approx(float(exact_loss.mean()), rel=3e-6, abs=3e-6)
    close(gradient, exact_gradient, 2**-8)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("credit", CREDITS)
def test_gradcheck_of_the_reference(credit: str, ratio: str) -> None:
    problem, options = drifted(("naive", "cpu"), "packed", credit)
    latents = (problem.model_output, problem.sample, problem.prev_sample)
    dense = problem.advantages.ndim > 1 and credit == "dense"
    problem = replace(
        Problem(*(t[:, :5, :2].double() for t in latents), *problem.positional[3:], -1),
        old_log_prob=problem.old_log_prob[:, :5].double() + 0.3,
        advantages=(problem.advantages[:, :5] if dense else problem.advantages).double(),
    )
    options["old_model_output"] = options["old_model_output"][:, :5, :2].double()
    if "weights" in options:
        options["weights"] = options["weights"][..., :5].double()
    threshold = threshold_of(problem, options, ratio)

    def loss(output: Tensor) -> Tensor:
        return weighted_policy_loss(
            output, *problem.positional[1:], channel_dim=-1, ratio=ratio, kl_mask_threshold=threshold,
            reduction="none", **options,
        ).loss  # fmt: skip

    leaf = problem.model_output.requires_grad_()
    if credit == "dense" and ratio == "sample":  # whose values and gradients differ by definition
        assert torch.autograd.grad(loss(leaf).sum(), leaf)[0].isfinite().all()
    else:
        assert torch.autograd.gradcheck(loss, leaf)


@pytest.mark.native
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_operator_passes_opcheck_and_compiles(ratio: str) -> None:
    problem, options = drifted(("native", "cpu"), "packed", "weights")
    threshold = threshold_of(problem, options, ratio)

    def loss(output: Tensor) -> Tensor:
        return weighted_policy_loss(
            output, *problem.positional[1:], channel_dim=-1, ratio=ratio, kl_mask_threshold=threshold, **options
        ).loss

    expected = run(problem, ("native", "cpu"), threshold, ratio=ratio, **options)
    leaf = problem.model_output.detach().requires_grad_()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf)
    assert torch.equal(found.detach(), expected[0])
    assert torch.equal(torch.autograd.grad(found, leaf)[0], expected[1])
    arguments = (
        leaf, *problem.positional[1:5], problem.transition.coefficients, options["weights"], None, None,
        options["old_model_output"], None, 2, ratio == "location", False, False, 0.0, float("inf"), 5.0, 0.0,
        threshold, "native",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.star_kernels.weighted_policy_loss.default, arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kl_mask_threshold": 0.0}, "kl_mask_threshold must be positive and finite, or None, got 0.0"),
        ({"kl_mask_threshold": float("nan")}, "kl_mask_threshold must be positive and finite, or None, got nan"),
        ({"clip_range": 0.2}, "clip_range must not be given with kl_mask_threshold, which replaces the clip, got 0.2"),
        ({"old_model_output": None}, "old_model_output must be given with kl_mask_threshold"),
        ({"kl_mask_threshold": "1e-5"}, "kl_mask_threshold must be a number"),
    ],
)
def test_errors_name_the_argument(given: Options, message: str) -> None:
    problem, options = drifted(("auto", "cpu"), "packed")
    options = {"kl_mask_threshold": 1e-5, **options, **given}
    with pytest.raises((TypeError, ValueError), match=message):
        weighted_policy_loss(*problem.positional, channel_dim=-1, **options)


@pytest.mark.native
def test_the_operators_require_the_old_output_too() -> None:
    problem, _ = drifted(("native", "cpu"), "packed")
    arguments = (
        *problem.positional[:5], problem.transition.coefficients, None, None, None, None, None,
        2, False, False, False, 0.0, float("inf"), 5.0, 0.0, 1e-5, "native",
    )  # fmt: skip
    with pytest.raises(ValueError, match="old_model_output must be given with kl_mask_threshold"):
        torch.ops.star_kernels.weighted_policy_loss(*arguments)
