"""Advantages of phrases and of locations under every option: accuracy, operators, graphs, masks without a location."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from problems import BATCH, LAYOUTS, MEMORY, RATIOS, Problem, make
from test_policy_dense import with_dense
from test_policy_options import options_of
from test_policy_phrases import with_phrases
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import Transition, flow_sde, weighted_policy_loss
from star_kernels.policy import naive, ops
from star_kernels.policy.arguments import PolicyArguments

KINDS = {"phrases": with_phrases, "dense": with_dense}
kinds = pytest.mark.parametrize("kind", KINDS)
PLACES = [("image_odd", "transposed"), ("packed_wide", "strided"), ("video", "batch_last"), ("one_position", "sliced")]
ratios = pytest.mark.parametrize("ratio", RATIOS)


def declared(
    problem: Problem, weights: Tensor, ratio: str, *, extras: bool, unreduced: bool = False
) -> PolicyArguments:
    """The arguments of the operator; ``extras`` turns every option on."""
    given = options_of(problem, "all") if extras else {}
    return PolicyArguments(
        *problem.positional[:5],
        coefficients=problem.transition.coefficients,
        weights=weights,
        mask=given.get("mask"),
        step_weights=given.get("step_weights"),
        old_model_output=given.get("old_model_output"),
        ref_model_output=given.get("ref_model_output"),
        channel_dim=problem.channel_dim % problem.sample.ndim,
        per_location=ratio == "location",
        weighted_kl=extras and problem.advantages.ndim == problem.old_log_prob.ndim != 2,
        unreduced=unreduced,
        clip_low=0.6,
        clip_high=1.4,
        advantage_clip=5.0,
        kl_coef=0.04 if extras else 0.0,
    )


def wide(arguments: PolicyArguments) -> PolicyArguments:
    return PolicyArguments._make(
        t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments
    )


def differentiate(
    function: Callable[[PolicyArguments], Any], arguments: PolicyArguments
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and metrics."""
    leaf = arguments.model_output.detach().requires_grad_()
    loss, metrics, *_ = function(arguments._replace(model_output=leaf))
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0], metrics


def operator(backend: str) -> Callable[[PolicyArguments], Any]:
    return naive.weighted_policy_loss if backend == "naive" else lambda a: ops.WEIGHTED_POLICY_LOSS(*a, backend)


@kinds
@ratios
@pytest.mark.parametrize("extras", [True, False], ids=["every_option", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layout", "memory"),
    mostly_exhaustive([*PLACES, *zip(LAYOUTS, cycle(MEMORY), strict=False)], PLACES),
)
def test_errors_are_at_most_twice_pytorchs(
    layout: str,
    memory: str,
    dtype: torch.dtype,
    extras: bool,
    ratio: str,
    kind: str,
    policy_backend: tuple[str, str],
    poisoned: None,
    assert_as_exact: Callable[..., None],
) -> None:
    problem, weights = KINDS[kind](make(policy_backend, layout, drift=0.01))
    view = MEMORY[memory]
    problem = replace(
        problem,
        model_output=view(problem.model_output.to(dtype)),
        sample=view(problem.sample),
        prev_sample=view(problem.prev_sample),
        advantages=MEMORY["strided"](problem.advantages),
    )
    arguments = declared(problem, MEMORY["strided"](weights), ratio, extras=extras, unreduced=True)
    got = differentiate(operator(policy_backend[0]), arguments)
    pytorch = differentiate(naive.weighted_policy_loss, arguments)
    exact = differentiate(naive.weighted_policy_loss, wide(arguments))
    assert got[1].dtype == dtype
    for name, found, eager, expected in zip(("loss", "gradient", "metrics"), got, pytorch, exact, strict=True):
        assert_as_exact(name, found, eager, expected, dtype if name == "gradient" else torch.float32)


@kinds
@ratios
def test_a_sample_without_a_location_contributes_nothing(
    ratio: str, kind: str, policy_backend: tuple[str, str], poisoned: None
) -> None:
    problem, weights = KINDS[kind](make(policy_backend, "image_odd", drift=0.01))
    arguments = declared(problem, weights, ratio, extras=True, unreduced=True)
    arguments.mask[2] = False
    arguments.sample[2] = torch.nan
    loss, gradient, metrics = differentiate(operator(policy_backend[0]), arguments)
    assert float(loss[2]) == 0
    assert not gradient[2].any()
    assert bool(gradient[[0, 1, 3]].flatten(1).any(dim=1).all())
    assert bool(metrics.isfinite().all())


@kinds
@ratios
def test_losses_of_samples_have_gradients_of_their_own(ratio: str, kind: str, policy_backend: tuple[str, str]) -> None:
    problem, weights = KINDS[kind](make(policy_backend))
    leaf = problem.model_output.requires_grad_()
    loss, _ = weighted_policy_loss(
        leaf, *problem.positional[1:], weights=weights, ratio=ratio, reduction="none", backend=policy_backend[0]
    )
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5], device=loss.device)
    (together,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
    for b in range(BATCH):
        (alone,) = torch.autograd.grad(loss[b], leaf, retain_graph=True)
        torch.testing.assert_close(together[b], upstream[b] * alone[b], rtol=1e-6, atol=1e-9)
        assert not alone[torch.arange(BATCH) != b].any()


@pytest.mark.native
@kinds
@ratios
def test_the_number_of_threads_does_not_change_bits(ratio: str, kind: str, threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    output, sample, prev = torch.randn(3, 4, 16, 64, 64, generator=generator)  # work for seven threads
    problem = make(("native", "cpu"))
    problem = replace(problem, model_output=output, sample=sample, prev_sample=prev, old_model_output=output + 0.01)
    problem = replace(problem, old_log_prob=torch.randn(4, 64, 64, generator=generator) - 5)
    problem, weights = KINDS[kind](problem)
    arguments = declared(problem, weights, ratio, extras=True)
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(differentiate(operator("native"), arguments))
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


@pytest.mark.native
@kinds
@ratios
def test_the_operators_pass_opcheck(ratio: str, kind: str) -> None:
    problem, weights = KINDS[kind](make(("native", "cpu"), "image_odd"))
    for extras in (True, False):
        arguments = declared(problem, weights, ratio, extras=extras)
        leaf = arguments._replace(model_output=arguments.model_output.clone().requires_grad_())
        operators = torch.ops.star_kernels
        torch.library.opcheck(operators.weighted_policy_loss.default, (*leaf, "native"))
        loss, _, saved = operators.weighted_policy_loss(*arguments, "native")
        assert saved.shape == (arguments.saved_rows, BATCH)
        torch.library.opcheck(
            operators.weighted_policy_loss_backward.default,
            (torch.ones_like(loss), saved, *arguments, "native"),
            test_utils=("test_schema", "test_faketensor"),
        )
        with pytest.raises(ValueError, match="saved must be a float32 tensor of shape"):
            operators.weighted_policy_loss_backward(torch.ones_like(loss), saved[:-1], *arguments, "native")


@pytest.mark.native
@kinds
@ratios
def test_no_result_of_an_operator_is_left_unwritten(ratio: str, kind: str, poisoned: None) -> None:
    problem, weights = KINDS[kind](make(("native", "cpu")))
    for extras in (True, False):
        for unreduced in (True, False):
            arguments = declared(problem, weights, ratio, extras=extras, unreduced=unreduced)
            results = torch.ops.star_kernels.weighted_policy_loss(*arguments, "native")
            assert all(bool(result.isfinite().all()) for result in results)


@pytest.mark.native
@kinds
@pytest.mark.parametrize("backend", mostly_exhaustive(["auto", "naive"], ["auto"]))
def test_compiles_to_one_graph_and_stays_right_when_shapes_change(kind: str, backend: str) -> None:
    def step(output: Tensor, rest: tuple[Tensor, ...], transition: Transition, weights: Tensor) -> Tensor:
        return weighted_policy_loss(output, *rest, transition, weights=weights, clip_range=0.5, backend=backend).loss

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    transition = flow_sde(0.9, 0.8, sigma_max=0.95)
    for seed, (height, phrases) in enumerate([(8, 3), (8, 3), (12, 5), (16, 4)]):
        generator = torch.Generator().manual_seed(seed)
        output, sample, prev = torch.randn(3, BATCH, 4, height, 8, generator=generator)
        shape = (BATCH, height, 8) if kind == "dense" else (BATCH, phrases)
        weights = torch.rand((*shape, height, 8) if kind == "phrases" else shape, generator=generator)
        rest = (sample, prev, torch.full((BATCH, height, 8), -9.0), torch.randn(shape, generator=generator))
        found = []
        for function in (step, compiled):
            leaf = output.clone().requires_grad_()
            loss = function(leaf, rest, transition, weights)
            found.append([loss, torch.autograd.grad(loss, leaf)[0]])
        for eager, got in zip(*found, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first shapes, and any
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.native
@pytest.mark.parametrize("position", range(len(PolicyArguments._fields)), ids=PolicyArguments._fields)
def test_the_compiled_library_reads_the_declared_order(position: int) -> None:
    from star_kernels import native

    arguments = list(declared(make(("native", "cpu"), "rows"), None, "sample", extras=True))
    arguments[position] = "misplaced"
    with pytest.raises(TypeError, match=rf"^{PolicyArguments._fields[position]} must be "):
        native.cpu().policy_forward(*arguments)
