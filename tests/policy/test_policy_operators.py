"""The policy operators as PyTorch sees them: schema, shapes, compilation, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from problems import BATCH, MEMORY, RATIOS, SIGMA, SIGMA_MAX, SIGMA_NEXT, Problem, locations, make, patch_weights
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import Transition, flow_sde, sample_transition, weighted_nft_loss, weighted_policy_loss


@pytest.mark.native
@pytest.mark.parametrize("ratio", RATIOS)
def test_peak_memory_is_one_gradient(ratio: str, peak_memory: Callable) -> None:
    shape = (8, 16, 64, 64)
    output, sample = torch.randn(shape, requires_grad=True), torch.randn(shape)
    transition = flow_sde(0.8, 0.7, sigma_max=SIGMA_MAX)
    prev, log_prob = sample_transition(output, sample, transition)
    weights, advantages = torch.ones(8, 32, 32), torch.ones(8)

    def step() -> Tensor:
        loss = weighted_policy_loss(
            output, sample, prev, log_prob, advantages, transition, weights=weights, ratio=ratio, clip_range=0.5
        ).loss
        return torch.autograd.grad(loss, output)[0]

    assert peak_memory(step) <= output.nbytes + 4096


def operator_arguments(problem: Problem, output: Tensor, extras: bool, per_location: bool, unreduced: bool) -> tuple:
    """The arguments of the operator: tensors, scalars, backend."""
    weights = patch_weights(problem, locations(tuple(output.shape), problem.channel_dim))
    shape, device = problem.old_log_prob.shape, output.device
    mask = torch.rand(shape, device=device) < 0.8
    mask.flatten(1)[:, 0] = True
    options = (weights, mask, torch.rand(BATCH, device=device), output + 0.01, output + 0.1) if extras else (None,) * 5
    scalars = (problem.channel_dim % output.ndim, per_location, extras, unreduced, 0.5, 1.5, 5.0, 0.1 * extras, 0.0)
    tensors = (problem.sample, problem.prev_sample, problem.old_log_prob, problem.advantages)
    return (output, *tensors, problem.transition.coefficients, *options, *scalars, "native")


def nft_arguments(problem: Problem, output: Tensor, extras: bool, unreduced: bool) -> tuple:
    _, _, _, _, advantages, _, weights, mask, numbers, old, reference, *_ = operator_arguments(
        problem, output, extras, False, unreduced
    )
    sigma = SIGMA.to(output.device)
    scalars = (problem.channel_dim % output.ndim, True, extras, unreduced, 0.7, 5.0, 0.1 * extras)
    old = output + 0.01 if old is None else old
    return (output, old, problem.sample, advantages, sigma, weights, mask, numbers, reference, *scalars, "native")


@pytest.mark.native
@pytest.mark.parametrize(
    ("dtype", "per_location", "layout"),
    mostly_exhaustive(
        itertools.product([torch.float32, torch.bfloat16], [True, False], ["image_odd", "packed", "video"]),
        [(torch.float32, True, "image_odd"), (torch.bfloat16, False, "image_odd")],
    ),
    ids=str,
)
def test_the_policy_operators_pass_opcheck(dtype: torch.dtype, per_location: bool, layout: str) -> None:
    problem = make(("native", "cpu"), layout, drift=0.01)
    tolerance = {"rtol": 1e-2, "atol": 1e-5} if dtype == torch.bfloat16 else {}
    operators = torch.ops.star_kernels
    for extras, memory in ((True, "contiguous"), (False, "channels_last"), (True, "transposed")):
        output = MEMORY[memory](problem.model_output.to(dtype))
        problem.sample = MEMORY[memory](problem.sample)
        arguments = operator_arguments(problem, output.detach().requires_grad_(), extras, per_location, extras)
        torch.library.opcheck(operators.weighted_policy_loss.default, arguments, **tolerance)
        detached = (output.detach(), *arguments[1:])
        loss, _, saved = operators.weighted_policy_loss(*detached)
        torch.library.opcheck(
            operators.weighted_policy_loss_backward.default,
            (torch.ones_like(loss), saved, *detached),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.native
@pytest.mark.parametrize("layout", ["image_odd", "packed"])
@pytest.mark.parametrize("extras", [True, False])
def test_the_nft_operators_pass_opcheck(extras: bool, layout: str) -> None:
    problem = make(("native", "cpu"), layout, drift=0.01)
    operators = torch.ops.star_kernels
    arguments = nft_arguments(problem, problem.model_output.detach().requires_grad_(), extras, extras)
    torch.library.opcheck(operators.weighted_nft_loss.default, arguments)
    detached = (arguments[0].detach(), *arguments[1:])
    loss, _, saved = operators.weighted_nft_loss(*detached)
    torch.library.opcheck(
        operators.weighted_nft_loss_backward.default,
        (torch.ones_like(loss), saved, *detached),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.native
@pytest.mark.parametrize("layout", ["image_odd", "packed"])
def test_the_sampling_operator_passes_opcheck(layout: str) -> None:
    problem = make(("native", "cpu"), layout)
    for memory in ("contiguous", "channels_last", "transposed"):
        output, sample = (MEMORY[memory](t) for t in (problem.model_output, problem.sample))
        noise, channel_dim = torch.randn_like(sample), problem.channel_dim % sample.ndim
        torch.library.opcheck(
            torch.ops.star_kernels.sample_transition.default,
            (output, sample, noise, problem.transition.coefficients, channel_dim, "native"),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.native
@pytest.mark.parametrize("unreduced", [True, False])
@pytest.mark.parametrize("per_location", [True, False])
def test_no_result_of_an_operator_is_left_unwritten(per_location: bool, unreduced: bool, poisoned: None) -> None:
    problem = make(("native", "cpu"))
    for extras in (True, False):
        policy = operator_arguments(problem, problem.model_output, extras, per_location, unreduced)
        nft = nft_arguments(problem, problem.model_output, extras, unreduced)
        results = [
            *torch.ops.star_kernels.weighted_policy_loss(*policy),
            *torch.ops.star_kernels.weighted_nft_loss(*nft),
        ]
        assert all(bool(result.isfinite().all()) for result in results)


@pytest.mark.native
@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("compiler", mostly_exhaustive(["aot_eager", "inductor"], ["aot_eager"]))
def test_compiles_to_one_graph_and_stays_right_when_values_and_shape_change(compiler: str, backend: str) -> None:
    def step(
        output: Tensor,
        sample: Tensor,
        prev: Tensor,
        old: Tensor,
        advantages: Tensor,
        transition: Transition,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        result = weighted_policy_loss(
            output, sample, prev, old, advantages, transition, weights=weights, clip_range=0.5, backend=backend
        )
        return result.loss, result.metrics["ratio_mean"]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for seed, height in enumerate((8, 8, 12, 16, 20) if compiler == "aot_eager" else (8, 8)):
        output, sample, prev = torch.randn(3, BATCH, 4, height, 8, generator=torch.Generator().manual_seed(seed))
        transition = flow_sde(SIGMA, SIGMA_NEXT, noise_level=0.5 + 0.1 * seed, sigma_max=SIGMA_MAX)
        old, weights = torch.full((BATCH, height, 8), -9.0), torch.rand(BATCH, height // 2, 4)
        found = []
        for function in (step, compiled):
            leaf = output.clone().requires_grad_()
            loss, ratio = function(leaf, sample, prev, old, torch.ones(BATCH), transition, weights)
            found.append([loss, ratio, torch.autograd.grad(loss, leaf)[0]])
        for eager, got in zip(*found, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first height, and any height
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.native
@pytest.mark.parametrize("backend", mostly_exhaustive(["auto", "naive"], ["auto"]))
def test_every_option_compiles_to_one_graph(backend: str) -> None:
    def step(output: Tensor, old: Tensor, mask: Tensor, numbers: Tensor, transition: Transition) -> Tensor:
        prev, log_prob = sample_transition(old, old, transition, noise=old, backend=backend)
        extras = {"mask": mask, "step_weights": numbers, "ref_model_output": old, "kl_coef": 0.1, "backend": backend}
        policy = weighted_policy_loss(
            output, old, prev, log_prob, numbers, transition, old_model_output=old, clip_range=0.5,
            reduction="none", **extras,
        )  # fmt: skip
        nft = weighted_nft_loss(output, old, prev, numbers, numbers, **extras)
        return policy.loss.sum() + nft.loss

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    transition = flow_sde(SIGMA, SIGMA_NEXT, sigma_max=SIGMA_MAX)
    for height in (8, 12, 16):
        output, old = torch.randn(2, BATCH, 4, height, 8)
        mask, numbers = torch.rand(BATCH, height, 8) < 2.0, torch.rand(BATCH) + 0.1
        found = []
        for function in (step, compiled):
            leaf = output.clone().requires_grad_()
            loss = function(leaf, old, mask, numbers, transition)
            found.append([loss, torch.autograd.grad(loss, leaf)[0]])
        for eager, got in zip(*found, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]
