"""Problems for the CUDA kernels in their emulation, with every layout, mixture of dtypes, option and credit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import star_kernels as sk
from star_kernels.policy import naive
from star_kernels.policy.arguments import NftArguments, PolicyArguments, SampleArguments

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LAYOUTS = {  # shape, channel dimension, grid of the weights
    "tiles and a bit": ((3, 4, 19, 32), 1, (19, 32)),
    "patch grid": ((2, 5, 8, 12), 1, (4, 3)),
    "runs across rows": ((2, 3, 8, 18), 1, (4, 9)),
    "rows shorter than a run": ((2, 3, 24, 2), 1, (12, 1)),
    "odd": ((2, 3, 7, 9), 1, (7, 3)),
    "video": ((2, 6, 4, 6, 8), 1, (2, 3, 4)),
    "many channels": ((1, 37, 4, 8), 1, (2, 8)),
    "packed": ((2, 70, 64), 2, (70,)),
    "packed wide": ((2, 5, 1100), 2, (5,)),
    "packed narrow": ((2, 300, 7), 2, (300,)),
    "channels innermost": ((2, 6, 8, 24), 3, (3, 2)),
    "one position": ((5, 2, 1, 1), 1, (1, 1)),
    "more samples than threads": ((70, 1, 2, 1), 1, (1, 1)),
}
DTYPES = {"float32": (F32, F32), "bfloat16": (BF16, F32), "float16 alone": (F16, F16), "mixed": (F32, BF16)}
VECTOR = [
    "tiles and a bit",
    "patch grid",
    "runs across rows",
    "video",
    "many channels",
    "packed",
    "channels innermost",
]  # with float32


@dataclass(frozen=True)
class Problem:
    """A step of a rollout and the options of an objective."""

    output: Tensor
    sample: Tensor
    noise: Tensor
    prev: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    coefficients: Tensor
    weights: Tensor | None
    mask: Tensor | None
    step_weights: Tensor | None
    old: Tensor
    reference: Tensor | None
    channel_dim: int
    guard: bool
    unreduced: bool
    kl_mask: bool = False

    def policy(self, per_location: bool) -> PolicyArguments:
        has_phrases = self.weights is not None and self.weights.ndim == self.output.ndim
        arguments = PolicyArguments(
            self.output,
            self.sample,
            self.prev,
            self.old_log_prob,
            self.advantages,
            self.coefficients,
            self.weights,
            self.mask,
            self.step_weights,
            old_model_output=self.old if self.guard else None,
            ref_model_output=self.reference,
            channel_dim=self.channel_dim,
            per_location=per_location,
            weighted_kl=self.guard and not has_phrases,
            unreduced=self.unreduced,
            clip_low=0.99,
            clip_high=1.02,
            advantage_clip=5.0,
            kl_coef=0.04,
        )
        return masked(arguments._replace(old_model_output=self.old)) if self.kl_mask else arguments

    def nft(self, adaptive: bool) -> NftArguments:
        return NftArguments(
            self.output,
            self.old,
            self.prev,
            self.advantages,
            torch.linspace(0.9, 0.2, len(self.advantages)),
            self.weights,
            self.mask,
            self.step_weights,
            ref_model_output=self.reference,
            channel_dim=self.channel_dim,
            adaptive=adaptive,
            weighted_kl=self.guard,
            unreduced=self.unreduced,
            beta=0.7,
            advantage_clip=2.0,
            kl_coef=0.1,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})


def make(layout: str, dtypes: str = "float32", extras: bool = False, drift: float = 1e-3) -> Problem:
    """A problem whose old model output is off by ``drift``; bfloat16 rounds most of a small one away."""
    shape, channel_dim, grid = LAYOUTS[layout]
    dtype, latents = DTYPES[dtypes]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*(size or shape), generator=generator)

    batch, locations = shape[0], [n for d, n in enumerate(shape) if d not in (0, channel_dim)]
    sigma = torch.linspace(0.9, 0.4, batch)
    coefficients = sk.flow_sde(sigma, sigma - 0.1, sigma_max=0.95).coefficients
    output, sample, noise = normal().to(dtype), normal().to(latents), normal()
    old = (output.float() + drift * normal()).to(dtype)
    prev, old_log_prob = naive.sample_transition(SampleArguments(old, sample, noise, coefficients, channel_dim))
    mask = torch.rand(batch, *locations, generator=generator) < 0.7
    mask[-1:] &= batch == 1  # the last sample keeps nothing
    return Problem(
        output, sample, noise, prev, old_log_prob, normal(batch), coefficients,
        weights=torch.rand(batch, *grid, generator=generator) if extras else None,
        mask=mask if extras else None,
        step_weights=torch.rand(batch, generator=generator) + 0.5 if extras else None,
        old=old,
        reference=(output.float() + 0.1 * normal()).to(dtype) if extras else None,
        channel_dim=channel_dim, guard=extras, unreduced=extras,
    )  # fmt: skip


def masked(arguments: PolicyArguments) -> PolicyArguments:
    """With a threshold that some divergences reach."""
    arguments = arguments._replace(clip_low=0.0, clip_high=math.inf, kl_mask_threshold=1.0)
    _, metrics = naive.weighted_policy_loss(arguments)
    return arguments._replace(kl_mask_threshold=0.9 * float(metrics[naive.METRICS.index("kl_new_old_mean")]))


def with_credit(problem: Problem, layout: str, credit: str) -> Problem:
    """With so many phrases, on the layout's grid of weights; or "dense" advantages, or "unweighted dense" ones."""
    generator = torch.Generator().manual_seed(1)
    batch, *locations = problem.old_log_prob.shape
    advantages, weights = torch.randn(batch, *locations, generator=generator), None
    if credit.isdigit():
        advantages = torch.randn(batch, int(credit), generator=generator)
        weights = torch.rand(batch, int(credit), *LAYOUTS[layout][2], generator=generator)
    elif credit == "dense":
        weights = torch.rand(batch, *LAYOUTS[layout][2], generator=generator)
    return replace(problem, advantages=4 * advantages, weights=weights)


class Results:
    """Memory for what the kernels write, which has NaN until then, and their calls."""

    def __init__(self, library: Any, arguments: PolicyArguments | NftArguments) -> None:
        output, batch = arguments.model_output, arguments.model_output.shape[0]
        size = batch, output.numel() // (batch * output.shape[arguments.channel_dim])
        if isinstance(arguments, PolicyArguments):
            name, metrics = "policy", naive.METRICS
            bytes_needed = library.policy_workspace_bytes(*size, arguments.phrases)
        else:
            name, metrics, bytes_needed = "nft", naive.NFT_METRICS, library.nft_workspace_bytes(*size)
        self.workspace = torch.full((bytes_needed,), 255, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
        self.loss = torch.full((batch,) if arguments.unreduced else (), torch.nan)
        self.metrics = torch.full((len(metrics),), torch.nan)
        self.saved = torch.full((arguments.saved_rows, batch), torch.nan)
        self.gradient = torch.full_like(output, torch.nan)
        self._library, self._name, self._arguments = library, name, arguments

    def forward(self, *, gradient: bool, launches: int) -> None:
        with counted(self._library, launches):
            getattr(self._library, f"{self._name}_forward")(
                *self._arguments, *self.workspace, self.loss, self.metrics, self.saved,
                self.gradient if gradient else None,
            )  # fmt: skip
        assert self.workspace[1].item() == 0
        assert not bool(self.saved.isnan().any()) or bool(self._arguments.model_output.isnan().any())

    def backward(self, upstream: Tensor, *, written: bool) -> None:
        with counted(self._library, 1):
            backward = getattr(self._library, f"{self._name}_backward")
            backward(*self._arguments, upstream, self.saved, self.gradient, written)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.loss, self.metrics, self.gradient))


@contextmanager
def counted(library: Any, launches: int) -> Iterator[None]:
    """Checks the number of launches."""
    before = library.launches()
    yield
    assert library.launches() == before + launches


def run(library: Any, arguments: PolicyArguments | NftArguments, upstream: Tensor) -> tuple[Tensor, ...]:
    """Loss, metrics and gradient of the forward and the backward kernel."""
    results = Results(library, arguments)
    results.forward(gradient=False, launches=1)
    results.backward(upstream, written=False)
    return tuple(results)


def run_fused(
    library: Any, arguments: PolicyArguments | NftArguments, shape: str = "16x32", *, launches: int = 1
) -> tuple[Tensor, ...]:
    """Loss, metrics and gradient, for an upstream gradient of ones, of the kernel that writes all of them.

    Args:
        shape: the largest number of blocks of a cluster and of threads of a block.
        launches: 2 if the kernel cannot run.
    """
    results = Results(library, arguments)
    with patch.dict(os.environ, {"STAR_KERNELS_FUSED": shape}):
        results.forward(gradient=True, launches=launches)
    return tuple(results)


def sampled(library: Any, problem: Problem, *threads: int) -> tuple[Tensor, Tensor]:
    prev, log_prob = torch.full_like(problem.sample, torch.nan), torch.full_like(problem.old_log_prob, torch.nan)
    latents = (problem.output, problem.sample, problem.noise)
    library.sample_transition(*latents, problem.coefficients, problem.channel_dim, *threads, prev, log_prob)
    return prev, log_prob


def assert_exact(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], size: float = 1.0) -> None:
    """``size``: that of the terms whose sum is a loss."""
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=1e-7 * size)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-7 * size)
    error = (found[2].double() - expected[2]).norm() / expected[2].norm()
    assert error < {F32: 1e-6, F16: 2**-11, BF16: 2**-8}[found[2].dtype]


def exact(loss: Callable[[Any], tuple[Tensor, Tensor]], arguments: Any, upstream: Tensor) -> tuple[Tensor, ...]:
    """Loss, metrics and gradient of the reference implementation, in float64."""
    wide = arguments._make(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments)
    wide.model_output.requires_grad_()
    value, metrics = loss(wide)
    (gradient,) = torch.autograd.grad(value, wide.model_output, upstream.double())
    return value.detach(), metrics, gradient


def upstream_of(problem: Problem) -> Tensor:
    scale = 2.0**12 if problem.output.dtype == F16 else 1.0  # keeps the gradient's elements normal numbers
    return scale * (torch.linspace(0.5, 1.5, len(problem.advantages)) if problem.unreduced else torch.tensor(0.5))


def spoilt(problem: Problem) -> Problem:
    """The problem with NaN wherever the mask drops a location."""
    if problem.mask is None:
        return problem
    keep = {problem.mask.ndim: problem.mask, problem.output.ndim: problem.mask.unsqueeze(problem.channel_dim)}
    names = ("output", "sample", "prev", "old_log_prob", "old", "reference")
    tensors = {name: getattr(problem, name) for name in names if getattr(problem, name) is not None}
    if problem.policy(False).dense:
        tensors["advantages"] = problem.advantages
    return replace(problem, **{n: t.masked_fill(~keep[t.ndim], torch.nan) for n, t in tensors.items()})


def misaligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that allows no more than one element at a time."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return storage[1:].view(tensor.shape).copy_(tensor)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
