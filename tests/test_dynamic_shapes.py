"""Every public function under torch.compile with dynamic shapes: one graph, with the results of the eager call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_inputs import SELECTION, TRANSITION, inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from star_kernels import (
    TokenSelection,
    Transition,
    allocate,
    attention,
    attention_maps,
    dance_sde,
    flow_cps,
    flow_matching,
    flow_sde,
    sample_transition,
    total_variation,
    weighted_nft_loss,
    weighted_policy_loss,
)

t = inputs()
QKV = (t["query"], t["key"], t["value"])
INDEX, WEIGHT = SELECTION.index, 2 * SELECTION.weight
SIGMA, ONE = torch.tensor([0.9, 0.7]), torch.ones(1)
MAPS = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def policy(output: Tensor, transition: Transition, backend: str) -> Tensor:
    given = (t["sample"], t["prev_sample"], t["old_log_prob"], t["advantages"], transition)
    extras: dict[str, Any] = {name: t[name] for name in ("weights", "mask", "step_weights")}
    return weighted_policy_loss(output, *given, clip_range=(0.5, 9.0), backend=backend, **extras).loss


def nft(output: Tensor, backend: str) -> Tensor:
    given = (t["old_model_output"], t["sample"], t["advantages"], t["sigma"])
    return weighted_nft_loss(output, *given, weights=t["weights"], mask=t["mask"], backend=backend).loss


def phrases(output: Tensor) -> Tensor:
    advantages, weights = (torch.stack([t[name]] * 2, dim=1) for name in ("advantages", "weights"))
    given = (output, t["sample"], t["prev_sample"], t["old_log_prob"], advantages, TRANSITION)
    return weighted_policy_loss(*given, weights=weights).loss


def mask(query: Tensor) -> Tensor:
    return torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)


# function, arguments
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "attention": (lambda q, k, v, s: attention(q, k, v, s, rows=(1, 3), return_lse=True), (*QKV, SELECTION)),
    "attention, masked": (lambda q, s: attention(q, q, q, s, rows=slice(1, 4), key_mask=mask(q)), (QKV[0], SELECTION)),
    "attention, naive": (lambda q, k, v, s: attention(q, k, v, s, backend="naive"), (*QKV, SELECTION)),
    "attention_maps": (lambda q, k, e, s: attention_maps(q, k, e, s), (*QKV[:2], t["lse"], SELECTION)),
    "attention_maps, of text": (
        lambda q, k, e, s: attention_maps(q, k, e, s, direction="text_to_image", reduce_heads=False),
        (*QKV[:2], t["lse"], SELECTION),
    ),
    "a selection": (lambda q, i, w: attention(q, q, q, TokenSelection(i, w).shift(0)).maps, (QKV[0], INDEX, WEIGHT)),
    "from_positions": (lambda q: attention(q, q, q, TokenSelection.from_positions([[1], [2, 3]])).maps, (QKV[0],)),
    "weighted_policy_loss": (lambda x, c: policy(x, c, "auto"), (t["model_output"], TRANSITION)),
    "weighted_policy_loss, naive": (lambda x, c: policy(x, c, "naive"), (t["model_output"], TRANSITION)),
    "weighted_policy_loss, phrases": (phrases, (t["model_output"],)),
    "weighted_policy_loss of a step": (
        lambda x, sigma: policy(x, flow_sde(sigma, 0.5, sigma_max=0.95), "auto"), (t["model_output"], SIGMA)
    ),
    "weighted_nft_loss": (lambda x: nft(x, "auto"), (t["model_output"],)),
    "weighted_nft_loss, naive": (lambda x: nft(x, "naive"), (t["model_output"],)),
    "sample_transition": (lambda x, e, c: sample_transition(x, e, c, noise=e), (t["sample"], t["noise"], TRANSITION)),
    "allocate": (lambda m: allocate(m, layout="bshw", over="trajectory", cap=1.5), (MAPS,)),
    "total_variation": (lambda m: total_variation(m, m.flip(1), layout="bshw"), (MAPS,)),
    "flow_sde": (lambda sigma: flow_sde(sigma, sigma / 2, sigma_max=0.95).coefficients, (SIGMA,)),
    "flow_sde of floats": (lambda x, a, b: flow_sde(a, b, sigma_max=a).coefficients * x, (ONE, 0.9, 0.5)),
    "flow_cps": (lambda sigma: flow_cps(sigma, sigma / 2).coefficients, (SIGMA,)),
    "flow_cps of floats": (lambda x, a, b: flow_cps(a, b, noise_level=b).coefficients * x, (ONE, 0.9, 0.5)),
    "dance_sde": (lambda sigma: dance_sde(sigma, sigma / 2).coefficients, (SIGMA,)),
    "dance_sde of floats": (lambda x, a, b: dance_sde(a, b, eta=b).coefficients * x, (ONE, 0.9, 0.5)),
    "flow_matching": (lambda sigma: flow_matching(sigma, weight=sigma).coefficients, (SIGMA,)),
    "flow_matching of floats": (lambda x, a, b: flow_matching(a, weight=b).coefficients * x, (ONE, 0.9, 0.5)),
}  # fmt: skip


def flat(results: Any) -> list[Tensor]:
    return [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]


@pytest.mark.filterwarnings("ignore")  # of Dynamo
@pytest.mark.parametrize("name", CASES)
def test_a_function_is_one_graph_with_dynamic_shapes(name: str) -> None:
    function, arguments = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for got, want in zip(flat(compiled(*arguments)), flat(function(*arguments)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_attention_has_one_graph_for_all_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_attention_and_maps, fullgraph=True, dynamic=True, backend=counter)
    for length in (6, 9, 12):
        query, key = torch.randn(2, 2, length, 8), torch.randn(2, 2, length + 1, 8)
        torch.testing.assert_close(compiled(query, key), _attention_and_maps(query, key))
    assert counter.frame_count == 1


def _attention_and_maps(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    out, maps, lse = attention(query, key, key, SELECTION, return_lse=True)
    return out + maps.mean(), attention_maps(query, key, lse, SELECTION)


@pytest.mark.filterwarnings("ignore")
def test_noise_in_a_graph_equals_eager_noise() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(sample_transition, fullgraph=True, dynamic=True, backend="eager")
    found = []
    for function in (sample_transition, compiled):
        torch.manual_seed(3)
        found.append(function(t["model_output"], t["sample"], TRANSITION)[0])
    assert torch.equal(*found)
    torch.manual_seed(3)
    drawn = sample_transition(t["model_output"], t["sample"], TRANSITION, noise=torch.randn(2, 4, 3, 4))[0]
    assert torch.equal(drawn, found[0])  # the noise of torch.randn
