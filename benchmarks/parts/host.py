"""The time of a call on tiny tensors, which is that of Python and of PyTorch's dispatcher: the host time of a call.

It is measured twice: in many consecutive calls of a function, with the processor's caches and branch predictors warm,
and in a few calls between those of the other functions. A call of a training loop lies between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parts.policy import check_equal
from benchmarks.parts.request import Request
from benchmarks.reporting.thresholds import HOST, HOST_BETWEEN_OTHERS
from benchmarks.timing.clocks import CpuClock
from benchmarks.timing.harness import Budget, Figure, Times, Variant, interleave
from benchmarks.variants.policy import NOISE_LEVEL, Inputs, flow_grpo, flow_grpo_step, make_inputs, ours, ours_directly
from star_kernels import TokenSelection, allocate, attention, flow_sde, sample_transition

HEADS, LENGTH, HEAD_DIM = 2, 16, 32
LATENT = (4, 8, 8)
STRENGTH = 0.5
CONSECUTIVE = 200  # calls that are timed together
BETWEEN_OTHERS = 10  # not one: reading a clock takes a part of the time of a call


class Pair(NamedTuple):
    """One of our functions and the same computation in PyTorch."""

    name: str  # of our variant; that of the other has a prefix, see ``measure``
    label: str
    ours: Callable[[], Any]
    other_label: str
    other: Callable[[], Any]


def measure(request: Request) -> Iterator[dict[str, Any]]:
    """Yields the case of consecutive calls, and that of calls between others. All variants run in one thread."""
    quick = request.extent == "quick"
    names = ("smoke test",) if quick else (HOST, HOST_BETWEEN_OTHERS)
    pairs = make_pairs(request.batch or 2, request.dtype, request.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:
            calls, part = (CONSECUTIVE, 0.7) if name == HOST else (BETWEEN_OTHERS, 1.0)
            yield {"name": name, **_case(request, pairs, calls, request.budget.share(part))}
    finally:
        torch.set_num_threads(threads)


def _case(request: Request, pairs: list[Pair], calls: int, budget: Budget) -> dict[str, Any]:
    variants = [
        variant
        for pair in pairs
        for variant in (
            Variant(f"other_{pair.name}", pair.other_label, pair.other),
            Variant(f"ours_{pair.name}", pair.label, pair.ours),
        )
    ]
    clock = CpuClock(request.device, calls=calls)
    times = interleave(variants, clock, budget, "host time of a call", warm_up=1)
    dtype, batch = str(request.dtype).removeprefix("torch."), request.batch or 2
    return {
        "title": f"tiny tensors, batch {batch}, {dtype}, one thread, {calls} calls of a function at a time",
        "batch": batch,
        "dtype": dtype,
        "clock": clock.name,
        **times.columns(variants, "other_attention"),
        "ratios": {
            **times.ratios({p.name: (f"{p.label} / {p.other_label}", f"ours_{p.name}", f"other_{p.name}")
                            for p in pairs}),
            **microseconds(times, pairs),
        },
        "notes": [*filter(None, (times.note,))],
    }  # fmt: skip


def microseconds(times: Times, pairs: list[Pair]) -> dict[str, dict[str, Any]]:
    """The figures that have limits: the time of attention above that of SDPA, and the times of the other functions."""
    found = {}
    for pair in pairs:
        key, other = f"ours_{pair.name}", f"other_{pair.name}"
        if pair.name.startswith("attention"):
            figure, label = times.difference(key, other), f"{pair.label} - {pair.other_label}, µs"
        else:
            figure, label = times.figure(key), f"{pair.label}, µs"
        found[f"{pair.name}_us"] = {"label": label, **_in_microseconds(figure)}
    return found


def make_pairs(batch: int, dtype: torch.dtype, device: torch.device) -> list[Pair]:
    """The compared calls, after a check that both of each pair compute the same.

    Raises:
        RuntimeError: if they differ.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    query, key, value = (normal(batch, HEADS, LENGTH, HEAD_DIM).to(dtype) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    upstream = torch.ones_like(query)
    selection = TokenSelection.from_positions([[1, 2, 3]] * batch).to(device)
    maps = normal(batch, LATENT[1] * LATENT[2]).abs()
    x = make_inputs((batch, *LATENT), dtype, device)
    noise = normal(batch, *LATENT)
    old = x.old_log_prob_mean
    model_output = x.model_output.detach()

    def step(eager: bool) -> Tensor:
        if eager:
            return flow_grpo_step(model_output, x.sample, x.sigma, x.sigma_next, x.sigma_max, noise=noise)[0]
        return sample_transition(model_output, x.sample, x.transition, noise=noise)[0]

    def with_gradients(forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(*leaves), leaves, upstream)

    sdpa = F.scaled_dot_product_attention
    pairs = [
        Pair("attention", "attention with maps", lambda: attention(query, key, value, selection).out,
             "SDPA", lambda: sdpa(query, key, value)),
        Pair("attention_gradients", "attention with detached maps, gradients",  # as in a capture
             lambda: with_gradients(lambda *qkv: attention(*qkv, selection, detach_maps=True).out),
             "SDPA, gradients", lambda: with_gradients(sdpa)),
        Pair("attention_differentiable", "attention with maps, gradients",
             lambda: with_gradients(lambda *qkv: attention(*qkv, selection).out),
             "SDPA, gradients, again", lambda: with_gradients(sdpa)),
        Pair("policy_loss", "policy loss, PolicyLoss.backward", ours_directly(x),
             "policy loss, eager, gradients", lambda: flow_grpo(x, old)[1]),
        Pair("policy_loss_autograd", "policy loss, autograd", lambda: ours(x, None),
             "policy loss, eager, autograd", lambda: flow_grpo(x, old)),
        Pair("sample_transition", "sample_transition", lambda: step(False),
             "sampling step, eager", lambda: step(True)),
        Pair("flow_sde", "flow_sde", lambda: _transition(x), "flow_sde, eager", lambda: eager_coefficients(x)),
        Pair("allocate", "allocate", lambda: allocate(maps, strength=STRENGTH),
             "allocate, eager", lambda: 1 - STRENGTH + STRENGTH * maps / maps.mean(dim=-1, keepdim=True)),
    ]  # fmt: skip
    check_equal(x)
    for pair in pairs:
        if pair.name != "policy_loss_autograd":  # checked above
            _check_close(pair.name, pair.ours(), pair.other())
    return pairs


def eager_coefficients(x: Inputs) -> Tensor:
    """The coefficients of :func:`star_kernels.flow_sde`, in eager PyTorch and float32 as in Flow-GRPO's trainer."""
    sigma, sigma_next = x.sigma, x.sigma_next
    dt = sigma_next - sigma
    s = torch.sqrt(sigma / (1 - torch.where(sigma == 1, x.sigma_max, sigma))) * NOISE_LEVEL
    std = s * torch.sqrt(-dt)
    return torch.stack(
        [
            1 + s**2 / (2 * sigma) * dt,
            (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt,
            std,
            1 / (2 * std**2),
            -torch.log(std) - math.log(math.sqrt(2 * math.pi)),
            1 / (2 * s**2),
        ]
    )


def _transition(x: Inputs) -> Tensor:
    return flow_sde(x.sigma, x.sigma_next, noise_level=NOISE_LEVEL, sigma_max=x.sigma_max).coefficients


def _check_close(name: str, found: Any, expected: Any) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for ours_, other in pairs:
        tolerance = 1e-4 if ours_.dtype == torch.float32 else 5e-2
        if not torch.allclose(ours_.float(), other.float(), rtol=tolerance, atol=tolerance):
            raise RuntimeError(f"{name} and the same computation in PyTorch differ by more than {tolerance:g}")


def _in_microseconds(figure: Figure) -> dict[str, Any]:
    times = ("median", "p20", "p80", "low", "high")
    return {name: 1e6 * value if name in times else value for name, value in figure.as_dict().items()}
