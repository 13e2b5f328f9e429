"""The coefficients of every sampler, compared with the step that its paper defines."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from star_kernels import Transition, dance_sde, flow_cps, flow_matching, flow_sde
from star_kernels.policy import transitions

SIGMAS = [(1.0, 0.95), (0.95, 0.9), (0.6, 0.45), (0.5, 0.499), (0.1, 0.02), (0.04, 0.0)]
SIGMA_MAX = 0.96


def flow_grpo_step(
    x: Tensor, v: Tensor, sigma: float, following: float, noise_level: float
) -> tuple[Tensor, float, float]:
    dt = following - sigma
    s = noise_level * math.sqrt(sigma / (1 - (SIGMA_MAX if sigma == 1 else sigma)))
    mean = x * (1 + s**2 * dt / (2 * sigma)) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, s * math.sqrt(-dt), s


def flow_cps_step(
    x: Tensor, v: Tensor, sigma: float, following: float, noise_level: float
) -> tuple[Tensor, float, float]:
    s = following * math.sin(noise_level * math.pi / 2)
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    return (1 - following) * x0 + math.sqrt(following**2 - s**2) * x1, s, s


def dance_grpo_step(x: Tensor, v: Tensor, sigma: float, following: float, eta: float) -> tuple[Tensor, float, float]:
    dt = following - sigma
    x0 = x - sigma * v
    score = -(x - (1 - sigma) * x0) / sigma**2
    return x + v * dt - 0.5 * eta**2 * dt * score, eta * math.sqrt(-dt), eta


@pytest.mark.parametrize(("sigma", "following"), SIGMAS)
@pytest.mark.parametrize("level", [0.2, 0.7, 0.9])
@pytest.mark.parametrize(
    ("step", "make"),
    [
        (flow_grpo_step, lambda s, n, level: flow_sde(s, n, noise_level=level, sigma_max=SIGMA_MAX)),
        (flow_cps_step, lambda s, n, level: flow_cps(s, n, noise_level=level)),
        (dance_grpo_step, lambda s, n, level: dance_sde(s, n, eta=level)),
    ],
    ids=["flow_sde", "flow_cps", "dance_sde"],
)
def test_coefficients_are_those_of_the_written_step(
    step: Callable, make: Callable, level: float, sigma: float, following: float
) -> None:
    x, v, prev = torch.randn(3, 100, dtype=torch.float64)
    mean, std, s = step(x, v, sigma, following, level)
    got = make(sigma, following, level)
    assert got.coefficients.shape == (6, 1)
    a, b, got_std, scale, offset, kl_scale = got.coefficients.double()
    close = {"rtol": 2e-7, "atol": 1e-7}  # coefficients are rounded to float32 once
    torch.testing.assert_close(a * x + b * v, mean, **close)
    torch.testing.assert_close(float(got_std), std, **close)
    squared = (prev - mean) ** 2
    if step is flow_cps_step:
        log_prob = -squared
    else:
        log_prob = -squared / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    torch.testing.assert_close(offset - scale * squared, log_prob, rtol=3e-7, atol=3e-7)
    if s:
        torch.testing.assert_close(float(kl_scale), 1 / (2 * s**2), rtol=2e-7, atol=0)


def test_flow_matching_scores_the_velocity_itself() -> None:
    weight = torch.tensor([0.5, 2.0])
    a, b, std, scale, offset, kl_scale = flow_matching(torch.tensor([0.3, 1.0]), weight=weight).coefficients
    assert a.tolist() == [0, 0]
    assert b.tolist() == [1, 1]
    assert offset.tolist() == [0, 0]
    assert torch.equal(scale, weight)
    assert torch.equal(kl_scale, weight)
    torch.testing.assert_close(std, (1 / (2 * weight)).sqrt())
    assert flow_matching(0.3).scale.tolist() == [1.0]


def test_properties_are_the_rows() -> None:
    transition = flow_sde(torch.tensor([0.9, 0.5]), 0.3, sigma_max=SIGMA_MAX)
    names = ("mean_sample", "mean_output", "std", "scale", "offset", "kl_scale")
    for name, row in zip(names, transition.coefficients, strict=True):
        assert torch.equal(getattr(transition, name), row)
    assert transition.device.type == "cpu"
    assert transition.to("meta").device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_batch_is_its_samples_one_by_one(dtype: torch.dtype) -> None:
    sigma = torch.tensor([1.0, 0.75, 0.25], dtype=dtype)
    following = torch.tensor([0.875, 0.5, 0.125], dtype=dtype)
    for make in (lambda s, n: flow_sde(s, n, sigma_max=SIGMA_MAX), flow_cps, dance_sde):
        together = make(sigma, following)
        assert together.coefficients.dtype == torch.float32
        apart = [make(float(s), float(n)).coefficients for s, n in zip(sigma, following, strict=True)]
        assert torch.equal(together.coefficients, torch.cat(apart, dim=1))


SAMPLERS = (lambda s, n: flow_sde(s, n, sigma_max=SIGMA_MAX), flow_cps, dance_sde)


def test_kernels_have_the_bits_of_tensor_operations() -> None:
    """Tensor operations compute all calls in a graph, under torch.func, and of tensors that require a gradient."""
    sigma = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.9 + 0.1
    sigma[:3] = 1.0
    following, weight = sigma * 0.75, sigma + 0.5
    for make in SAMPLERS:
        found = make(sigma, following).coefficients
        single = [make(float(s), float(n)).coefficients for s, n in zip(sigma, following, strict=True)]
        assert torch.equal(found, torch.cat(single, dim=1))
        assert torch.equal(found, make(sigma.clone().requires_grad_(), following).coefficients)
        compiled = torch.compile(lambda s, n, make=make: make(s, n).coefficients, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(sigma, following), found)
        mapped = torch.vmap(lambda s, n, make=make: make(s, n).coefficients, out_dims=2)(sigma[3:9], following[3:9])
        assert torch.equal(mapped[:, 0], found[:, 3:9])
    found = flow_matching(sigma, weight=weight).coefficients
    assert torch.equal(found, flow_matching(sigma.clone().requires_grad_(), weight=weight).coefficients)
    single = [flow_matching(float(s), weight=float(w)).coefficients for s, w in zip(sigma, weight, strict=True)]
    assert torch.equal(found, torch.cat(single, dim=1))


@pytest.mark.native
def test_ordinary_arguments_need_no_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats, integers, and tensors of every dtype and stride. Large integers are not passed to the kernel."""

    def refuse(*rows: object) -> None:
        raise AssertionError("tensor operations were called")

    schedule = torch.linspace(1, 0, 6)
    given: list[tuple[Tensor | float, Tensor | float]] = [(0.75, 0.5), (1, 0), (schedule[1], schedule[2])]
    given += [(schedule[:4], schedule[1:5]), (schedule.double()[::2], 0), (torch.tensor([0.75]).expand(3), 0.5)]
    given += [(torch.tensor([0.75, 0.5]).to(dtype), torch.tensor(0.25)) for dtype in (torch.float16, torch.bfloat16)]
    for make in (*SAMPLERS, lambda s, n: flow_matching(s, weight=n + 1)):
        wide = [[torch.as_tensor(value).double().clone().requires_grad_() for value in both] for both in given]
        expected = [make(*both).coefficients for both in wide]
        with monkeypatch.context() as patch:
            patch.setattr(transitions, "_stack", refuse)
            found = [make(*both).coefficients for both in given]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    for weight in (2**60, 2**70, 10**30):
        assert float(flow_matching(0.5, weight=weight).scale) == pytest.approx(float(weight))


def test_numbers_give_a_transition_on_the_default_device() -> None:
    assert flow_cps(0.5, 0.25).device.type == "cpu"
    with torch.device("meta"):
        assert flow_cps(0.5, 0.25).device.type == "meta"
        assert flow_cps(torch.tensor(0.5, device="cpu"), 0.25).device.type == "cpu"


def test_sigmas_that_require_a_gradient_are_differentiated() -> None:
    sigma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(dance_sde(sigma, 0.7).std.sum(), sigma)
    assert float(gradient) == pytest.approx(0.5 * 0.3 / math.sqrt(0.1), rel=1e-6)


def test_infinite_coefficients_are_those_of_tensors() -> None:
    one, many = flow_cps(0.1, 0.0).coefficients, flow_cps(torch.full((40,), 0.1), 0.0).coefficients
    assert float(one[5]) == math.inf
    assert torch.equal(flow_cps(0.1, 0.0, noise_level=1e-30).kl_scale, one[5])
    assert torch.equal(flow_cps(torch.full((40,), 0.1, dtype=torch.float64), 0.0).coefficients[:, :1], one)
    assert many.shape == (6, 40)
    assert float(dance_sde(0.5, 0.4, eta=1e-30).kl_scale) == math.inf


@pytest.mark.parametrize(
    ("sigma", "following"), [(torch.tensor([0.875, 0.75]), 0.25), (0.875, torch.tensor([0.25, 0.5]))]
)
def test_one_sigma_applies_to_a_batch(sigma: Tensor | float, following: Tensor | float) -> None:
    both = torch.broadcast_tensors(torch.as_tensor(sigma), torch.as_tensor(following))
    for make in (flow_cps, dance_sde):
        assert torch.equal(make(sigma, following).coefficients, make(*both).coefficients)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 1.0), st.floats(0.0, 0.999), st.floats(0.05, 0.95))
def test_coefficients_are_finite_and_the_density_normalised(sigma: float, fraction: float, level: float) -> None:
    following = sigma * fraction
    for transition in (
        flow_sde(sigma, following, noise_level=level, sigma_max=0.999),
        dance_sde(sigma, following, eta=level),
    ):
        assert bool(transition.coefficients.isfinite().all())
        std, scale, offset = (float(row) for row in transition.coefficients[2:5].double())
        assert scale * std**2 == pytest.approx(0.5, rel=1e-6)
        assert math.exp(offset) * std * math.sqrt(2 * math.pi) == pytest.approx(1.0, rel=1e-5)


def test_bad_coefficients_are_named() -> None:
    for bad, error, message in (
        ([1.0], TypeError, "coefficients must be a float32 tensor, got list"),
        (torch.ones(6, 1, dtype=torch.float64), TypeError, "coefficients must be a float32 tensor, got torch.float64"),
        (torch.ones(5, 1), ValueError, r"coefficients must have shape \[6, B\], got \[5, 1\]"),
        (torch.ones(6), ValueError, r"coefficients must have shape \[6, B\], got \[6\]"),
        (torch.ones(6, 0), ValueError, r"coefficients must have shape \[6, B\], got \[6, 0\]"),
    ):
        with pytest.raises(error, match=message):
            Transition(bad)
