"""The policy's Triton kernels in Triton's interpreter: errors, bits, launches, and sums over samples and tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_nft_loss as nft
import test_policy_options as options
import torch
from problems import BATCH, LAYOUTS, MEMORY, SAMPLERS, Problem, locations, make
from tiers import mostly_exhaustive
from torch import Tensor
from triton_interpreter import INTERPRETED, TIERS, inner, outer, require_interpreter, run_interpreted
from triton_policy import BACKEND, prepare

from star_kernels import sample_transition, weighted_nft_loss, weighted_policy_loss
from star_kernels.policy import naive, ops
from star_kernels.policy.arguments import NftArguments, PolicyArguments

require_interpreter()
if INTERPRETED:
    from star_kernels.policy import triton_gradient, triton_latents, triton_loss, triton_nft, triton_sampling


@outer
@pytest.mark.parametrize("tier", TIERS)
def test_in_the_interpreter(tier: str) -> None:
    run_interpreted(__file__, tier)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)


EVERY_OPTION = ("image_odd", "many_channels", "packed", "one_position", "rows")


def policy_arguments(problem: Problem, ratio: str, every_option: bool, credit: str = "plain") -> PolicyArguments:
    """``credit``: "plain" advantages [B], "dense" or "unweighted dense" ones, or the number of phrases."""
    given = options.options_of(problem, "all") if every_option else {}
    size = locations(tuple(problem.sample.shape), problem.channel_dim)
    generator = torch.Generator().manual_seed(4)
    advantages = problem.advantages
    if credit.isdigit():
        advantages = 4 * torch.randn(BATCH, int(credit), generator=generator)
        given["weights"] = torch.rand(BATCH, int(credit), *size, generator=generator)
    elif credit != "plain":
        advantages = 4 * torch.randn(BATCH, *size, generator=generator)
        given["weights"] = None if "unweighted" in credit else torch.rand(BATCH, *size, generator=generator)
    clip = 0.4 if ratio == "location" else 0.02
    return PolicyArguments(
        problem.model_output,
        problem.sample,
        problem.prev_sample,
        problem.old_log_prob,
        advantages,
        problem.transition.coefficients,
        weights=given.get("weights"),
        mask=given.get("mask"),
        step_weights=given.get("step_weights"),
        old_model_output=given.get("old_model_output"),
        ref_model_output=given.get("ref_model_output"),
        channel_dim=problem.channel_dim % problem.sample.ndim,
        per_location=ratio == "location",
        weighted_kl=every_option and not credit.isdigit(),
        unreduced=False,
        clip_low=1 - clip,
        clip_high=1 + clip,
        advantage_clip=5.0,
        kl_coef=given.get("kl_coef", 0.0),
    )


def nft_arguments(layout: str) -> NftArguments:
    """With every option."""
    batch = nft.Batch(BACKEND, layout)
    given = batch.options()
    return NftArguments(
        batch.output,
        batch.old,
        batch.target,
        batch.advantages,
        batch.sigma,
        given["weights"],
        given["mask"],
        given["step_weights"],
        given["ref_model_output"],
        channel_dim=batch.channel_dim % batch.output.ndim,
        adaptive=True,
        weighted_kl=True,
        unreduced=False,
        beta=0.5,
        advantage_clip=5.0,
        kl_coef=0.1,
    )


def wide(arguments: Any) -> Any:
    return arguments._make(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments)


def policy_kernels(arguments: PolicyArguments) -> tuple[Tensor, ...]:
    return ops.WEIGHTED_POLICY_LOSS(*arguments, "triton")


def nft_kernels(arguments: NftArguments) -> tuple[Tensor, ...]:
    return ops.WEIGHTED_NFT_LOSS(*arguments, "triton")


def differentiate(function: Callable, arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    leaf = arguments.model_output.detach().requires_grad_()
    result = function(arguments._replace(model_output=leaf))[0]
    return result.detach(), torch.autograd.grad(result.sum(), leaf)[0]


def check_errors(kernels: Callable, reference: Callable, arguments: Any) -> None:
    """At most twice PyTorch's own error in float32, both against float64, and at most 1e-6.

    PyTorch's loss may happen to be exact; one unit in the last place of the samples' losses is always allowed, and of
    the losses of locations of both signs before they cancel.
    """
    got, pytorch = differentiate(kernels, arguments), differentiate(reference, arguments)
    exact = differentiate(reference, wide(arguments))
    each, _ = reference(wide(arguments)._replace(unreduced=True, advantages=wide(arguments).advantages.abs()))
    size = float(each.abs().mean())
    error, own = (abs(float(loss) - float(exact[0])) / size for loss, _ in (got, pytorch))
    assert error <= min(1e-6, 2 * own + torch.finfo(torch.float32).eps)
    error, own = (float((grad - exact[1]).norm() / exact[1].norm()) for _, grad in (got, pytorch))
    assert error <= min(1e-6, 2 * own)


@inner
@pytest.mark.parametrize("ratio", ["sample", "location"])
@pytest.mark.parametrize("every_option", [False, True], ids=["plain", "every_option"])
@pytest.mark.parametrize("layout", mostly_exhaustive(EVERY_OPTION, ["rows"]))
def test_errors_are_at_most_twice_pytorchs(layout: str, every_option: bool, ratio: str, poisoned: None) -> None:
    arguments = policy_arguments(make(BACKEND, layout, drift=0.01), ratio, every_option)
    check_errors(policy_kernels, naive.weighted_policy_loss, arguments)


CREDITS = ["1", "2", "4", "5", "dense", "unweighted dense"]


@inner
@pytest.mark.parametrize("ratio", ["sample", "location"])
@pytest.mark.parametrize("every_option", mostly_exhaustive([False, True], [True]), ids=["plain", "every_option"])
@pytest.mark.parametrize(
    ("layout", "credit"),
    mostly_exhaustive(
        [
            *(("rows", "5"), ("rows", "dense"), ("rows", "unweighted dense"), ("image_odd", "4")),
            *(("image_odd", "dense"), ("packed", "2"), ("packed", "dense"), ("one_position", "1")),
        ],
        lambda layout, credit: layout == "rows" and credit in ("5", "dense"),
    ),
)
def test_errors_with_phrases_and_dense_advantages_are_at_most_twice_pytorchs(
    layout: str, credit: str, every_option: bool, ratio: str, poisoned: None
) -> None:
    arguments = policy_arguments(make(BACKEND, layout, drift=0.01), ratio, every_option, credit)
    check_errors(policy_kernels, naive.weighted_policy_loss, arguments)
    _, metrics, saved = policy_kernels(arguments)
    expected = naive.weighted_policy_loss(wide(arguments))[1]
    torch.testing.assert_close(metrics.double(), expected, rtol=1e-5, atol=1e-6)
    assert bool(saved.isfinite().all())


@inner
@pytest.mark.parametrize("ratio", mostly_exhaustive(["sample", "location"], ["location"]))
@pytest.mark.parametrize("credit", mostly_exhaustive(CREDITS, ["4", "dense"]))
def test_unreduced_losses_on_a_grid_of_weights_have_gradients_of_their_own(
    credit: str, ratio: str, poisoned: None
) -> None:
    arguments = policy_arguments(make(BACKEND, "channels_between", drift=0.01), ratio, True, credit)
    arguments = arguments._replace(unreduced=True)
    if arguments.weights is not None:  # locations (12, 14)
        coarse = torch.rand(*arguments.weights.shape[:-2], 6, 7, generator=torch.Generator().manual_seed(5))
        arguments = arguments._replace(weights=coarse)
    leaf, exact = arguments.model_output.clone().requires_grad_(), wide(arguments)
    loss, upstream = policy_kernels(arguments._replace(model_output=leaf))[0], torch.tensor([1.0, 0.0, 0.5, -2.0])
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    exact.model_output.requires_grad_()
    expected = naive.weighted_policy_loss(exact)[0]
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    (expected_gradient,) = torch.autograd.grad(expected, exact.model_output, upstream.double())
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) <= 1e-6
    assert not gradient[1].any()


@inner
@pytest.mark.parametrize("ratio", mostly_exhaustive(["sample", "location"], ["sample"]))
def test_a_single_phrase_has_the_bits_of_advantages_of_samples(ratio: str) -> None:
    phrase = policy_arguments(make(BACKEND, "rows", drift=0.01), ratio, True, "1")
    plain = phrase._replace(advantages=phrase.advantages[:, 0], weights=phrase.weights[:, 0])
    for one, two in zip(policy_kernels(phrase), policy_kernels(plain), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(differentiate(policy_kernels, phrase)[1], differentiate(policy_kernels, plain)[1])


@inner
@pytest.mark.parametrize("credit", mostly_exhaustive(["2", "dense"], ["dense"]))
def test_a_ratio_that_overflows_costs_only_advantages_that_it_does_not_clip(credit: str, poisoned: None) -> None:
    """An infinite ratio is clipped for a positive advantage; the sum for negative ones is then zero, not 0 * inf."""
    for ratio in ("sample", "location"):
        arguments = policy_arguments(make(BACKEND, "rows", drift=0.01), ratio, False, credit)
        arguments = arguments._replace(advantages=arguments.advantages.abs(), old_log_prob=arguments.old_log_prob - 200)
        loss, gradient = differentiate(policy_kernels, arguments)
        expected, _ = differentiate(naive.weighted_policy_loss, wide(arguments))
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)
        assert not gradient.any()


@inner
@pytest.mark.parametrize("layout", mostly_exhaustive(EVERY_OPTION, ["rows"]))
def test_nft_errors_are_at_most_twice_pytorchs(layout: str, poisoned: None) -> None:
    check_errors(nft_kernels, naive.weighted_nft_loss, nft_arguments(layout))


@inner
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", mostly_exhaustive(["rows", "packed", "one_position", "channels_between"], ["rows"]))
def test_an_unchanged_model_has_a_ratio_of_exactly_one_wherever_its_numbers_lie(
    layout: str, dtype: torch.dtype
) -> None:
    """The rollout's tensors are contiguous, those of the loss are not: the sums over channels must not notice."""
    shape, channel_dim = LAYOUTS[layout]
    output, sample = torch.randn(shape).to(dtype), torch.randn(shape)
    transition = SAMPLERS["flow_sde"]()
    prev, log_prob = sample_transition(output, sample, transition, channel_dim=channel_dim, backend="triton")
    for ratio, first, second in (("sample", "strided", "batch_last"), ("location", "channels_last", "transposed")):
        moved = (MEMORY[first](output), MEMORY[second](sample), MEMORY[first](prev))
        metrics = weighted_policy_loss(
            *moved, log_prob, torch.ones(BATCH), transition,
            ratio=ratio, old_model_output=output.clone(), channel_dim=channel_dim, backend="triton",
        ).metrics  # fmt: skip
        assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
        assert metrics["approx_kl"] == metrics["clip_fraction"] == 0


@inner
@pytest.mark.parametrize("ratio", mostly_exhaustive(["sample", "location"], ["location"]))
def test_a_sample_without_a_location_contributes_nothing(ratio: str, poisoned: None) -> None:
    """The public function refuses such a mask on a CPU, but looks at none on a GPU."""
    problem = make(BACKEND, "rows", drift=0.01)
    policies = [policy_arguments(problem, ratio, True, credit) for credit in ("plain", "2", "dense")]
    for arguments, kernels, reference in (
        *((policy, policy_kernels, naive.weighted_policy_loss) for policy in policies),
        (nft_arguments("rows"), nft_kernels, naive.weighted_nft_loss),
    ):
        arguments.mask[2] = False
        arguments[1][2] = torch.nan  # sample or old_model_output, at dropped locations
        result, gradient = differentiate(kernels, arguments)
        expected, _ = differentiate(reference, wide(arguments))
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)
        assert not gradient[2].any()
        assert bool(gradient[[0, 1, 3]].flatten(1).any(dim=1).all())
        assert bool(kernels(arguments)[1].isfinite().all())


@inner
@pytest.mark.parametrize("ratio", mostly_exhaustive(["sample", "location"], ["location"]))
def test_programs_that_loop_over_tiles_compute_the_same_loss(ratio: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for programs in (1024, BATCH):
        monkeypatch.setattr(triton_latents, "_PROGRAMS", programs)
        problem, results = make(BACKEND, "packed", drift=0.01), [*nft_kernels(nft_arguments("packed"))]
        for credit in ("plain", "5", "dense"):
            results += policy_kernels(policy_arguments(problem, ratio, True, credit))
        found.append(results)
    shape = triton_latents.geometry(problem.model_output, 2)
    assert (shape.tiles, shape.tiles_to_add) == (2, 1)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


@inner
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((19, 2, 3), id="many_samples", marks=pytest.mark.exhaustive),
        pytest.param((1, 64, 33 * 32), id="many_tiles"),
    ],
)
def test_all_samples_and_all_tiles_are_added_up(shape: tuple[int, int, int], poisoned: None) -> None:
    """More than the last program adds up in one step."""
    output, sample, prev = torch.randn(3, *shape)
    advantages, old = torch.randn(shape[0]), torch.full((shape[0], shape[2]), -1.0)
    coefficients = torch.tensor([[1.0], [-0.1], [0.3], [0.2], [0.5], [1.0]])
    phrases = torch.randn(shape[0], 3), torch.rand(shape[0], 3, shape[2])
    for (credit, weights), per_location in (
        ((advantages, None), True), (phrases, False), ((torch.randn(shape[0], shape[2]), None), False)
    ):  # fmt: skip
        scalars = (1, per_location, False, False, 0.5, 1.5, 5.0, 0.0)
        arguments = PolicyArguments(output, sample, prev, old, credit, coefficients, weights, *(None,) * 4, *scalars)
        results = policy_kernels(arguments)
        expected = naive.weighted_policy_loss(wide(arguments))
        torch.testing.assert_close(results[0].double(), expected[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(results[1].double(), expected[1], rtol=1e-6, atol=1e-6)
        assert bool(results[2].isfinite().all())


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


@inner
def test_each_pass_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: dict[str, Counted] = {}
    for module in (triton_loss, triton_gradient, triton_nft, triton_sampling):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            kernels[name] = Counted(getattr(module, name))
            monkeypatch.setattr(module, name, kernels[name])

    def launched() -> dict[str, int]:
        counts = {name: kernel.launches for name, kernel in kernels.items() if kernel.launches}
        for kernel in kernels.values():
            kernel.launches = 0
        return counts

    problem = make(BACKEND, "rows")
    leaf = problem.model_output.requires_grad_()
    mask = torch.ones(BATCH, *locations(*LAYOUTS["rows"]), dtype=torch.bool)
    extras = {"mask": mask, "ref_model_output": problem.sample, "kl_coef": 0.1, "backend": "triton"}
    sample_transition(leaf, problem.sample, problem.transition, backend="triton")
    assert launched() == {"sampling_kernel": 1}
    result = weighted_policy_loss(*problem.positional, old_model_output=problem.sample, **extras)
    assert launched() == {"policy_forward_kernel": 1}
    result.loss.backward()
    assert launched() == {"policy_backward_kernel": 1}
    for credit in ("4", "dense"):  # the latents are read once
        arguments = policy_arguments(problem, "sample", False, credit)
        result = policy_kernels(arguments._replace(model_output=leaf))[0]
        assert launched() == {"policy_forward_kernel": 1}
        result.backward()
        assert launched() == {"policy_backward_kernel": 1}
    result = weighted_nft_loss(leaf, problem.sample, problem.sample, problem.advantages, torch.ones(BATCH), **extras)
    assert launched() == {"nft_forward_kernel": 1}
    result.loss.backward()
    assert launched() == {"nft_backward_kernel": 1}


@inner
def test_equal_calls_give_equal_bits() -> None:
    problem = make(BACKEND, "packed", drift=0.01)
    found = []
    for copy in (problem, replace(problem, model_output=problem.model_output.clone())):
        arguments = policy_arguments(copy, "location", True)
        found.append([*differentiate(policy_kernels, arguments)])
        found[-1] += differentiate(nft_kernels, nft_arguments("packed"))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
