"""The contract of ``weighted_policy_loss``, for every backend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import (
    BATCH,
    LAYOUTS,
    MEMORY,
    RATIOS,
    SAMPLERS,
    SIGMA_MAX,
    Problem,
    close,
    column,
    locations,
    log_density,
    make,
    patch_weights,
    run,
    upsampled,
    written_loss,
)
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import Transition, flow_sde, sample_transition, weighted_policy_loss

QUICK = {"one_position", "rows", "packed_wide", "channels_between"}  # every order of the channels, odd and small


@pytest.mark.parametrize("scalar", [True, False], ids=["old_of_sample", "old_of_location"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("drift", [3e-4, 0.05])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_weights_give_flow_grpo(
    sampler: str, drift: float, kl_coef: float, scalar: bool, policy_backend: tuple[str, str]
) -> None:
    problem = make(policy_backend, sampler=sampler, drift=drift)
    reference = problem.model_output + 0.1 * torch.randn_like(problem.model_output) if kl_coef else None
    exact_loss, exact_gradient = written_loss(problem, sampler, reference=reference, kl_coef=kl_coef, clip_range=1e-3)
    if scalar:
        problem.old_log_prob = problem.old_log_prob.double().flatten(1).mean(dim=1).float()
    options = {"ref_model_output": reference, "kl_coef": kl_coef, "clip_range": 1e-3}
    loss, gradient, _ = run(problem, policy_backend, **options)
    assert loss.dtype == torch.float32
    assert exact_gradient.norm() > 0
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-6)
    close(gradient, exact_gradient, 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_uniform_weights_give_flow_grpo_bit_by_bit(ratio: str, layout: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, layout)
    ones = torch.ones_like(problem.old_log_prob)
    loss, gradient, metrics = run(problem, policy_backend, ratio=ratio, clip_range=0.01)
    same_loss, same_gradient, same_metrics = run(problem, policy_backend, ratio=ratio, clip_range=0.01, weights=ones)
    assert torch.equal(loss, same_loss)
    assert torch.equal(gradient, same_gradient)
    assert all(torch.equal(metrics[name], same_metrics[name]) for name in metrics)


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weighted_loss_and_gradient_are_the_written_objective(
    layout: str, ratio: str, kl_coef: float, policy_backend: tuple[str, str], poisoned: None
) -> None:
    problem = make(policy_backend, layout, drift=0.01)
    weights = patch_weights(problem, locations(*LAYOUTS[layout]))
    reference = problem.model_output + 0.1 * torch.randn_like(problem.model_output) if kl_coef else None
    common = {"weights": weights, "ratio": ratio, "kl_coef": kl_coef}
    clip = 0.5 if ratio == "location" else 0.02
    exact_loss, exact_gradient = written_loss(problem, "flow_sde", reference=reference, clip_range=clip, **common)
    loss, gradient, metrics = run(problem, policy_backend, ref_model_output=reference, clip_range=clip, **common)
    # exp of a log-ratio that is a difference of log-probabilities of size 1 to 10, each good to 1e-6
    assert float(loss) == pytest.approx(float(exact_loss), rel=3e-6, abs=3e-6)
    close(gradient, exact_gradient, 3e-6)
    assert all(bool(m.isfinite()) for m in metrics.values())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    ("layout", "grids"),
    [
        ("image", [[12, 10], [24, 10], [1, 1], [6, 20], [2, 4]]),
        ("video", [[3, 6, 7], [1, 12, 14], [3, 1, 2], [1, 1, 1]]),
        ("channels_innermost", [[12, 10]]),
        ("video_frames_first", [[1, 6, 7]]),
    ],
)
def test_weights_on_a_patch_grid_equal_the_upsampled_ones(
    layout: str, grids: list, ratio: str, policy_backend: tuple[str, str]
) -> None:
    problem = make(policy_backend, layout)
    for grid in grids:
        coarse = patch_weights(problem, grid)
        fine = upsampled(coarse, locations(*LAYOUTS[layout]))
        found = [run(problem, policy_backend, weights=w, ratio=ratio, clip_range=0.5) for w in (coarse, fine)]
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", mostly_exhaustive(LAYOUTS, QUICK))
def test_an_unchanged_model_has_a_ratio_of_exactly_one(
    layout: str, ratio: str, dtype: torch.dtype, policy_backend: tuple[str, str]
) -> None:
    backend, device = policy_backend
    shape, channel_dim = LAYOUTS[layout]
    transition = SAMPLERS["flow_sde"]().to(device)
    for latents in {torch.float32, dtype}:
        for memory in MEMORY.values():
            output, sample = (
                memory(torch.randn(shape, device=device).to(dtype)),
                memory(torch.randn(shape, device=device)),
            )
            sample = sample.to(latents)
            prev, log_prob = sample_transition(output, sample, transition, channel_dim=channel_dim, backend=backend)
            problem = Problem(output, sample, prev, log_prob, torch.ones(BATCH, device=device), transition, channel_dim)
            _, _, metrics = run(problem, policy_backend, ratio=ratio)
            assert metrics["ratio_mean"] == 1
            assert metrics["ratio_max"] == 1
            assert metrics["approx_kl"] == 0
            assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layout", ["image", "image_odd", "video", "packed", "rows"])
def test_memory_layout_does_not_change_loss_or_gradient(
    layout: str, memory: str, ratio: str, policy_backend: tuple[str, str], poisoned: None
) -> None:
    problem = make(policy_backend, layout)
    weights = patch_weights(problem, locations(*LAYOUTS[layout]))
    reference = problem.model_output + 0.1
    options = {"weights": weights, "ratio": ratio, "clip_range": 0.5, "kl_coef": 0.1}
    loss, gradient, _ = run(problem, policy_backend, ref_model_output=reference, **options)
    view = MEMORY[memory]
    moved = replace(
        problem,
        model_output=view(problem.model_output),
        sample=view(problem.sample),
        prev_sample=view(problem.prev_sample),
        old_log_prob=MEMORY["strided"](problem.old_log_prob),
        advantages=MEMORY["strided"](problem.advantages),
    )
    options["weights"] = MEMORY["strided"](weights)
    same_loss, same_gradient, _ = run(moved, policy_backend, ref_model_output=view(reference), **options)
    torch.testing.assert_close(same_loss, loss, rtol=1e-6, atol=1e-7)
    close(same_gradient, gradient.double(), 1e-6)
    only = replace(problem, model_output=view(problem.model_output))  # the others keep their layout
    close(run(only, policy_backend, ref_model_output=reference, **options)[1], gradient.double(), 1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_packed_latent_is_the_image_of_the_same_numbers(ratio: str, policy_backend: tuple[str, str]) -> None:
    image = make(policy_backend, "image")
    weights = patch_weights(image, [24, 20])

    def pack(t: Tensor) -> Tensor:
        return t.flatten(2).transpose(1, 2).contiguous()

    packed = Problem(
        pack(image.model_output),
        pack(image.sample),
        pack(image.prev_sample),
        image.old_log_prob.flatten(1),
        image.advantages,
        image.transition,
        -1,
    )
    loss, gradient, _ = run(image, policy_backend, ratio=ratio, weights=weights, clip_range=0.5)
    same_loss, same_gradient, _ = run(packed, policy_backend, ratio=ratio, weights=weights.flatten(1), clip_range=0.5)
    torch.testing.assert_close(same_loss, loss, rtol=1e-6, atol=1e-7)
    close(same_gradient, pack(gradient).double(), 1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_permuted_positions_give_permuted_gradients(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, "packed")
    weights = patch_weights(problem, [130])
    order = torch.randperm(130)
    moved = replace(
        problem,
        model_output=problem.model_output[:, order],
        sample=problem.sample[:, order],
        prev_sample=problem.prev_sample[:, order],
        old_log_prob=problem.old_log_prob[:, order],
    )
    loss, gradient, _ = run(problem, policy_backend, ratio=ratio, weights=weights, clip_range=0.5)
    same_loss, moved_gradient, _ = run(moved, policy_backend, ratio=ratio, weights=weights[:, order], clip_range=0.5)
    torch.testing.assert_close(same_loss, loss, rtol=1e-6, atol=1e-7)
    close(moved_gradient, gradient[:, order].double(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", ["image", "packed", "video"])
@pytest.mark.parametrize("latents", ["float32", "as model_output"])
def test_16_bit_outputs_give_a_gradient_with_one_rounding(
    layout: str, ratio: str, dtype: torch.dtype, latents: str, policy_backend: tuple[str, str]
) -> None:
    problem = make(policy_backend, layout, drift=0.05)
    problem.model_output = problem.model_output.to(dtype)
    if latents != "float32":
        problem.sample, problem.prev_sample = problem.sample.to(dtype), problem.prev_sample.to(dtype)
    weights = patch_weights(problem, locations(*LAYOUTS[layout]))
    options = {"weights": weights, "ratio": ratio, "clip_range": 0.9, "upstream": 4096.0}  # keeps float16 in range
    exact_loss, exact_gradient = written_loss(problem, "flow_sde", **options)
    loss, gradient, _ = run(problem, policy_backend, **options)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-5)
    error = (gradient.double() - exact_gradient).abs()
    allowed = 0.51 * torch.finfo(dtype).eps * exact_gradient.abs() + 1e-5 * exact_gradient.abs().max()
    assert bool((error <= allowed).all())


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_clip_range_of_1e5_is_resolved(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, drift=0.0)
    _, problem.old_log_prob = sample_transition(
        problem.model_output,
        problem.sample,
        problem.transition,
        noise=(problem.prev_sample - problem.prev_sample),
        backend=policy_backend[0],
    )
    prev, log_prob = sample_transition(
        problem.model_output, problem.sample, problem.transition, backend=policy_backend[0]
    )
    problem.prev_sample, problem.advantages = prev, torch.tensor([1.0, 1.0, -1.0, -1.0], device=prev.device)
    shift = torch.tensor([2e-5, 5e-6, -2e-5, -5e-6], device=prev.device)  # clipped, free, clipped, free
    problem.old_log_prob = log_prob - column(shift, log_prob).float()
    _, gradient, metrics = run(problem, policy_backend, ratio=ratio, clip_range=1e-5)
    assert metrics["clip_fraction"] == 0.5
    for b, clipped in enumerate((True, False, True, False)):
        assert bool((gradient[b] == 0).all()) == clipped


def test_pessimism_keeps_the_gradient_where_clipping_would_help(policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, drift=0.0)
    shift = torch.tensor([0.5, 0.5, -0.5, -0.5], device=problem.advantages.device)
    problem.advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], device=shift.device)
    problem.old_log_prob = problem.old_log_prob - column(shift, problem.old_log_prob).float()
    loss, gradient, metrics = run(problem, policy_backend, clip_range=0.2)
    expected = (-1.2 + math.exp(0.5) - math.exp(-0.5) + 0.8) / 4
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert [bool(g.any()) for g in gradient] == [False, True, True, False]
    assert float(metrics["clip_fraction"]) == 1.0


@pytest.mark.parametrize("ratio", RATIOS)
def test_asymmetric_clip_ranges(ratio: str, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, drift=0.0)
    problem.advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], device=problem.advantages.device)
    shift = torch.tensor([0.25, 0.05, -0.25, -0.05], device=problem.advantages.device)
    problem.old_log_prob = problem.old_log_prob - column(shift, problem.old_log_prob).float()
    loss, gradient, _ = run(problem, policy_backend, ratio=ratio, clip_range=(0.1, 0.2))
    assert float(loss) == pytest.approx((-1.2 - math.exp(0.05) + 0.9 + math.exp(-0.05)) / 4, abs=1e-5)
    assert [bool(g.any()) for g in gradient] == [False, True, False, True]


@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_advantages_are_clamped(limit: float, policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend)
    loss, gradient, _ = run(problem, policy_backend, advantage_clip=limit)
    clamped = replace(problem, advantages=problem.advantages.clamp(-limit, limit))
    same_loss, same_gradient, _ = run(clamped, policy_backend, advantage_clip=100.0)
    assert torch.equal(loss, same_loss)
    assert torch.equal(gradient, same_gradient)


def test_metrics_are_what_they_say(policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend, drift=0.02)
    reference = problem.model_output + 0.1
    for ratio in RATIOS:
        leaf = problem.model_output.clone().requires_grad_()
        options = {"ratio": ratio, "clip_range": 0.05, "ref_model_output": reference, "kl_coef": 0.25}
        result = weighted_policy_loss(leaf, *problem.positional[1:], backend=policy_backend[0], **options)
        log_prob, mean, s = log_density(
            "flow_sde", problem.model_output.double(), problem.sample.double(), problem.prev_sample.double()
        )
        _, reference_mean, _ = log_density("flow_sde", reference.double(), problem.sample.double(), mean)
        delta = log_prob.mean(dim=1) - problem.old_log_prob.double()
        delta = delta.flatten(1).mean(dim=1) if ratio == "sample" else delta
        rho = delta.exp()
        expected = {
            "ratio_mean": rho.mean(),
            "ratio_max": rho.max(),
            "clip_fraction": ((rho - 1).abs() > 0.05).double().mean(),
            "approx_kl": 0.5 * (delta**2).mean(),
            "policy_loss": result.loss.detach().double() - 0.25 * ((mean - reference_mean) ** 2 / (2 * s**2)).mean(),
            "kl_loss": ((mean - reference_mean) ** 2 / (2 * s**2)).mean(),
        }
        assert set(result.metrics) == set(expected)
        for name, value in expected.items():
            metric = result.metrics[name]
            assert metric.shape == ()
            assert not metric.requires_grad
            torch.testing.assert_close(metric.double(), value, rtol=2e-5, atol=2e-6, msg=f"{ratio} {name}")


@pytest.mark.parametrize("ratio", RATIOS)
def test_nan_in_one_sample_stays_visible_and_out_of_the_others_gradients(
    ratio: str, policy_backend: tuple[str, str]
) -> None:
    problem = make(policy_backend)
    _, clean, _ = run(problem, policy_backend, ratio=ratio, clip_range=0.5)
    for where in ("model_output", "sample", "prev_sample", "old_log_prob"):
        broken = replace(problem, **{where: getattr(problem, where).clone()})
        getattr(broken, where)[1].view(-1)[5] = torch.nan
        loss, gradient, metrics = run(broken, policy_backend, ratio=ratio, clip_range=0.5)
        assert loss.isnan()
        assert bool(gradient[1].isnan().any())
        assert torch.equal(gradient[[0, 2, 3]], clean[[0, 2, 3]])
        assert metrics["ratio_mean"].isnan()
        assert metrics["ratio_max"].isnan(), f"NaN in {where} is not the largest ratio"


@pytest.mark.parametrize("ratio", RATIOS)
def test_an_infinite_ratio_is_clipped_or_infinite_but_never_nan_in_the_gradient(
    ratio: str, policy_backend: tuple[str, str]
) -> None:
    problem = make(policy_backend)
    problem.old_log_prob[0] -= 200.0  # rho overflows; a positive advantage clips it
    loss, gradient, _ = run(problem, policy_backend, ratio=ratio, clip_range=0.2)
    assert bool(loss.isfinite())
    assert not gradient[0].any()
    assert bool(gradient[1:].isfinite().all())


def test_one_column_of_coefficients_serves_the_batch(policy_backend: tuple[str, str]) -> None:
    problem = make(policy_backend)
    one = flow_sde(0.6, 0.5, sigma_max=SIGMA_MAX).to(problem.sample.device)
    many = Transition(one.coefficients.expand(6, BATCH))
    found = [run(replace(problem, transition=t), policy_backend, clip_range=0.9) for t in (one, many)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_backends_agree_to_rounding() -> None:
    for ratio in RATIOS:
        problem = make(("naive", "cpu"), "video", drift=0.01)
        weights = patch_weights(problem, [3, 6, 7])
        naive, auto = (
            run(problem, (name, "cpu"), weights=weights, ratio=ratio, clip_range=0.3) for name in ("naive", "auto")
        )
        torch.testing.assert_close(auto[0], naive[0], rtol=2e-6, atol=1e-6)
        close(auto[1], naive[1].double(), 2e-6)
