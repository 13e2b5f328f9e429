"""The sampling step: the distribution of its results, and their log-probability."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from star_kernels import Transition, dance_sde, flow_cps, flow_sde, sample_transition

SIGMA_MAX = 0.95
LAYOUTS = {
    "image": ((2, 4, 31, 17), 1),
    "packed": ((2, 45, 64), -1),
    "video": ((2, 4, 3, 10, 11), 1),
    "video_frames_first": ((2, 3, 4, 10, 11), 2),
    "one_position": ((2, 5, 1, 1), 1),
    "many_channels": ((2, 9, 1100), 2),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def coefficients(
    mean_sample: float, mean_output: float, std: float, scale: float = 1.0, offset: float = 0.0
) -> Transition:
    return Transition(torch.tensor([[mean_sample], [mean_output], [std], [scale], [offset], [1.0]]))


@pytest.mark.parametrize("latents", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_and_log_prob_are_those_of_the_gaussian(
    layout: str, outputs: torch.dtype, latents: torch.dtype, policy_backend: tuple[str, str], poisoned: None
) -> None:
    backend, device = policy_backend
    shape, channel_dim = LAYOUTS[layout]
    output, sample, noise = (torch.randn(shape).to(device, dtype) for dtype in (outputs, latents, torch.float32))
    transition = flow_sde(torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.4]), sigma_max=SIGMA_MAX).to(device)
    prev, log_prob = sample_transition(
        output, sample, transition, noise=noise, channel_dim=channel_dim, backend=backend
    )
    assert prev.dtype == latents
    assert prev.shape == sample.shape
    assert log_prob.dtype == torch.float32
    assert list(log_prob.shape) == [n for d, n in enumerate(shape) if d != channel_dim % len(shape)]
    assert not prev.requires_grad

    a, b, std, scale, offset, _ = (row.double().view(-1, *[1] * (len(shape) - 1)) for row in transition.coefficients)
    mean = a * sample.double() + b * output.double()
    exact = mean + std * noise.double()
    rounding = 0.5 * torch.finfo(latents).eps if latents != torch.float32 else 0.0
    torch.testing.assert_close(prev.double(), exact, rtol=1.01 * rounding + 1e-6, atol=1e-6)
    density = (offset - scale * (prev.double() - mean) ** 2).mean(dim=channel_dim)  # of the value that is returned
    torch.testing.assert_close(log_prob.double(), density, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_latent_survives_a_step_that_changes_nothing(
    dtype: torch.dtype, policy_backend: tuple[str, str]
) -> None:
    backend, device = policy_backend
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    sample = bits.view(dtype).reshape(1, 2, 32768).to(device)
    still = torch.zeros(sample.shape, device=device)
    prev, _ = sample_transition(still, sample, coefficients(1.0, 0.0, 1.0).to(device), noise=still, backend=backend)
    torch.testing.assert_close(prev, sample, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_16_bits_equals_pytorchs(dtype: torch.dtype, policy_backend: tuple[str, str]) -> None:
    backend, device = policy_backend
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    half = (every[1:] + every[:-1]) / 2  # ties, in each direction by a hair as well, and subnormal numbers
    hair = (
        torch.nextafter(half, torch.full_like(half, torch.inf)),
        torch.nextafter(half, torch.full_like(half, -torch.inf)),
    )
    extremes = torch.tensor(
        [65504.0, 65519.99, 65520.0, 1e30, -1e30, 3.39e38, 2.0**-25, 2.0**-24, 1e-40, -0.0, torch.nan]
    )
    noise = torch.cat([half, *hair, extremes, torch.randn(10000) * 1e-6])
    noise = noise[None, None].to(device)
    still = torch.zeros_like(noise)
    transition = coefficients(0.0, 0.0, 1.0).to(device)
    prev, _ = sample_transition(still, still.to(dtype), transition, noise=noise, backend=backend)
    torch.testing.assert_close(prev, noise.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "make",
    [lambda: flow_sde(0.8, 0.6, sigma_max=SIGMA_MAX), lambda: flow_cps(0.8, 0.6), lambda: dance_sde(0.8, 0.6)],
    ids=["flow_sde", "flow_cps", "dance_sde"],
)
def test_draws_have_the_stated_mean_and_deviation(make: Callable, policy_backend: tuple[str, str]) -> None:
    backend, device = policy_backend
    transition = make().to(device)
    output, sample = torch.full((1, 4, 250, 250), 0.5, device=device), torch.full((1, 4, 250, 250), -1.5, device=device)
    prev, log_prob = sample_transition(output, sample, transition, backend=backend)
    a, b, std, scale, offset, _ = (float(row) for row in transition.coefficients)
    standard = (prev.double() - (a * -1.5 + b * 0.5)) / std
    count = prev.numel()
    # Five standard errors: one false alarm in two million.
    assert abs(float(standard.mean())) < 5 / math.sqrt(count)
    assert abs(float(standard.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((standard**3).mean())) < 5 * math.sqrt(15 / count)
    assert float(log_prob.mean()) == pytest.approx(
        offset - scale * std**2, abs=5 * scale * std**2 * math.sqrt(2 / count)
    )
    channels = standard.flatten(2)[0]
    assert bool((torch.corrcoef(channels) - torch.eye(4, device=device)).abs().max() < 5 / math.sqrt(count / 4))


def test_a_generator_makes_draws_repeatable(policy_backend: tuple[str, str]) -> None:
    backend, device = policy_backend
    output, sample = torch.randn(2, 2, 4, 16, 16, device=device)
    transition = flow_cps(0.8, 0.6).to(device)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return sample_transition(output, sample, transition, generator=generator, backend=backend)[0]

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    torch.manual_seed(5)
    first = sample_transition(output, sample, transition, backend=backend)[0]
    torch.manual_seed(5)
    assert torch.equal(first, sample_transition(output, sample, transition, backend=backend)[0])


def test_16_bit_latents_get_the_noise_of_float32_ones(policy_backend: tuple[str, str]) -> None:
    backend, device = policy_backend
    zeros = torch.zeros(2, 4, 16, 16, device=device)
    transition = coefficients(0.0, 0.0, 3.0).to(device)
    draws = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator(device).manual_seed(1)
        draws.append(sample_transition(zeros, zeros.to(dtype), transition, generator=generator, backend=backend)[0])
    assert torch.equal(draws[0].bfloat16(), draws[1])


def test_a_step_keeps_no_graph(policy_backend: tuple[str, str]) -> None:
    backend, device = policy_backend
    output, sample, noise = (torch.randn(2, 4, 8, 8, device=device, requires_grad=True) for _ in range(3))
    transition = flow_cps(0.8, 0.6).to(device)
    prev, log_prob = sample_transition(output, sample, transition, noise=noise, backend=backend)
    assert not prev.requires_grad
    assert not log_prob.requires_grad


def test_inputs_are_not_modified(policy_backend: tuple[str, str]) -> None:
    backend, device = policy_backend
    tensors = [torch.randn(2, 4, 8, 8, device=device) for _ in range(3)]
    before = [t.clone() for t in tensors]
    sample_transition(tensors[0], tensors[1], flow_cps(0.8, 0.6).to(device), noise=tensors[2], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
