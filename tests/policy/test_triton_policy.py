"""The Triton kernels of the policy, held to the contract of every backend by Triton's interpreter on a CPU.

The tests of this file run in the interpreter's process, whose output is shown where one fails. The contract's tests
are called here with a choice of their parameters; a machine with a GPU runs them all. Rounding to bfloat16 is left to
such a machine: the interpreter cuts bits off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_nft_loss as nft
import test_policy_loss as loss
import test_policy_options as options
import test_policy_phrases as phrases
import test_sampling as sampling
import torch
from problems import BATCH, LAYOUTS, MEMORY, SAMPLERS, Problem, locations, make
from tiers import mostly_exhaustive
from torch import Tensor
from triton_interpreter import INTERPRETED, TIERS, inner, outer, require_interpreter, run_interpreted

from star_kernels import sample_transition, weighted_nft_loss, weighted_policy_loss
from star_kernels.policy import loss as public_loss
from star_kernels.policy import naive, ops
from star_kernels.policy import sampling as public_sampling

require_interpreter()
if INTERPRETED:
    from star_kernels.policy import triton_latents, triton_loss, triton_nft, triton_sampling

BACKEND = ("triton", "cpu")


@outer
@pytest.mark.parametrize("tier", TIERS)
def test_in_the_interpreter(tier: str) -> None:
    run_interpreted(__file__, tier)


@pytest.fixture(autouse=True)
def dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets CPU tensors through to the backend that is asked for."""
    for module in (public_loss, public_sampling):
        monkeypatch.setattr(module, "resolve_backend", lambda backend, _: backend)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles for each sample, one of them partial, where there were four: the interpreter takes them in turn."""
    for layout, shape in (("image", (16, 12, 20)), ("packed", (37, 64)), ("many_channels", (300, 3, 3))):
        monkeypatch.setitem(LAYOUTS, layout, ((BATCH, *shape), LAYOUTS[layout][1]))


HALF = torch.float16
CONTRACT: list[tuple[Callable[..., None], tuple]] = [
    (loss.test_no_weights_give_flow_grpo, ("flow_sde", 3e-4, 0.0, True)),
    (loss.test_no_weights_give_flow_grpo, ("flow_cps", 0.05, 0.04, False)),
    (loss.test_no_weights_give_flow_grpo, ("flow_matching", 0.05, 0.0, False)),
    (loss.test_uniform_weights_give_flow_grpo_bit_by_bit, ("sample", "image")),
    (loss.test_uniform_weights_give_flow_grpo_bit_by_bit, ("location", "packed")),
    (loss.test_weights_on_a_patch_grid_equal_the_upsampled_ones, ("video", [[3, 6, 7], [1, 12, 2]], "location")),
    (loss.test_weights_on_a_patch_grid_equal_the_upsampled_ones, ("image", [[6, 4]], "sample")),
    (loss.test_weights_on_a_patch_grid_equal_the_upsampled_ones, ("video_frames_first", [[1, 6, 7]], "sample")),
    (loss.test_memory_layout_does_not_change_loss_or_gradient, ("video", "transposed", "sample")),
    (loss.test_memory_layout_does_not_change_loss_or_gradient, ("packed", "strided", "location")),
    (loss.test_memory_layout_does_not_change_loss_or_gradient, ("rows", "sliced", "sample")),
    (loss.test_16_bit_outputs_give_a_gradient_with_one_rounding, ("video", "location", HALF, "float32")),
    (loss.test_16_bit_outputs_give_a_gradient_with_one_rounding, ("packed", "sample", HALF, "as model_output")),
    (loss.test_a_clip_range_of_1e5_is_resolved, ("sample",)),
    (loss.test_a_clip_range_of_1e5_is_resolved, ("location",)),
    (loss.test_pessimism_keeps_the_gradient_where_clipping_would_help, ()),
    (loss.test_asymmetric_clip_ranges, ("location",)),
    (loss.test_advantages_are_clamped, (0.5,)),
    (loss.test_metrics_are_what_they_say, ()),
    (loss.test_nan_in_one_sample_stays_visible_and_out_of_the_others_gradients, ("sample",)),
    (loss.test_nan_in_one_sample_stays_visible_and_out_of_the_others_gradients, ("location",)),
    (loss.test_an_infinite_ratio_is_clipped_or_infinite_but_never_nan_in_the_gradient, ("sample",)),
    (loss.test_an_infinite_ratio_is_clipped_or_infinite_but_never_nan_in_the_gradient, ("location",)),
    (loss.test_one_column_of_coefficients_serves_the_batch, ()),
    (options.test_loss_and_gradient_are_the_written_objective, ("image", "masked weights", "location")),
    (options.test_loss_and_gradient_are_the_written_objective, ("image_odd", "guard", "sample")),
    (options.test_loss_and_gradient_are_the_written_objective, ("packed", "masked KL", "sample")),
    (options.test_loss_and_gradient_are_the_written_objective, ("video", "weighted guard", "location")),
    (options.test_loss_and_gradient_are_the_written_objective, ("channels_between", "all", "location")),
    (options.test_loss_and_gradient_are_the_written_objective, ("channels_between", "step weights", "sample")),
    (options.test_whatever_lies_under_the_mask_reaches_nothing, ("video", "location")),
    (options.test_whatever_lies_under_the_mask_reaches_nothing, ("packed", "sample")),
    (options.test_one_old_log_prob_a_sample_is_the_mean_over_the_mask, ()),
    (options.test_losses_of_samples_have_gradients_of_their_own, ("location",)),
    (options.test_weights_of_the_kl_act_on_the_kl_alone, ()),
    (phrases.test_the_loss_is_the_sum_over_phrases_with_one_penalty, ("packed", "location")),
    (phrases.test_one_phrase_is_the_loss_without_phrases_to_the_last_bit, ("sample",)),
    (nft.test_loss_and_gradient_are_the_written_objective_under_every_option, ("image_odd", True)),
    (nft.test_loss_and_gradient_are_the_written_objective_under_every_option, ("channels_between", False)),
    (nft.test_each_option_alone, ("mask",)),
    (nft.test_uniform_weights_equal_no_weights_bit_by_bit, ("packed",)),
    (nft.test_weights_on_a_patch_grid_equal_the_upsampled_ones, ()),
    (nft.test_metrics_are_what_they_say, ()),
    (nft.test_the_least_error_keeps_a_perfect_model_finite, ()),
    (nft.test_whatever_lies_under_the_mask_reaches_nothing, ("video",)),
    (nft.test_nan_in_one_sample_stays_visible_and_out_of_the_others_gradients, ("target",)),
    (nft.test_16_bit_outputs_give_a_gradient_with_one_rounding, ("video", HALF)),
    (sampling.test_step_and_log_prob_are_those_of_the_gaussian, ("image", torch.float32, torch.float32)),
    (sampling.test_step_and_log_prob_are_those_of_the_gaussian, ("packed", HALF, torch.float32)),
    (sampling.test_step_and_log_prob_are_those_of_the_gaussian, ("video_frames_first", torch.float32, HALF)),
    (sampling.test_step_and_log_prob_are_those_of_the_gaussian, ("many_channels", HALF, HALF)),
    (sampling.test_every_16_bit_latent_survives_a_step_that_changes_nothing, (HALF,)),
]


# One call of each kind.
QUICK = {
    loss.test_no_weights_give_flow_grpo: ("flow_cps", 0.05, 0.04, False),
    loss.test_uniform_weights_give_flow_grpo_bit_by_bit: ("sample", "image"),
    loss.test_weights_on_a_patch_grid_equal_the_upsampled_ones: ("image", [[6, 4]], "sample"),
    loss.test_memory_layout_does_not_change_loss_or_gradient: ("rows", "sliced", "sample"),
    loss.test_16_bit_outputs_give_a_gradient_with_one_rounding: ("packed", "sample", HALF, "as model_output"),
    loss.test_a_clip_range_of_1e5_is_resolved: ("sample",),
    loss.test_metrics_are_what_they_say: (),
    options.test_loss_and_gradient_are_the_written_objective: ("channels_between", "all", "location"),
    options.test_whatever_lies_under_the_mask_reaches_nothing: ("packed", "sample"),
    phrases.test_one_phrase_is_the_loss_without_phrases_to_the_last_bit: ("sample",),
    nft.test_loss_and_gradient_are_the_written_objective_under_every_option: ("channels_between", False),
    sampling.test_step_and_log_prob_are_those_of_the_gaussian: ("packed", HALF, torch.float32),
}


@inner
@pytest.mark.parametrize(
    ("test", "parameters"),
    mostly_exhaustive(CONTRACT, lambda test, parameters: QUICK.get(test) == parameters),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_contract_holds(test: Callable[..., None], parameters: tuple, poisoned: None) -> None:
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    given = [name for name in wanted if name not in ("policy_backend", "poisoned")]
    arguments: dict[str, Any] = dict(zip(given, parameters, strict=True))
    fixtures = {"policy_backend": BACKEND, "poisoned": None}
    test(**arguments, **{name: value for name, value in fixtures.items() if name in wanted})


EVERY_OPTION = ("image_odd", "many_channels", "packed", "one_position", "rows")


def policy_arguments(problem: Problem, ratio: str, every_option: bool) -> tuple:
    """Those of naive.weighted_policy_loss."""
    given = options.options_of(problem, "all") if every_option else {}
    clip = 0.4 if ratio == "location" else 0.02
    names = ("weights", "mask", "step_weights", "old_model_output", "ref_model_output")
    scalars = (problem.channel_dim % problem.sample.ndim, ratio == "location", every_option, False)
    coefficients = problem.transition.coefficients
    tensors = (*problem.positional[:5], coefficients, *(given.get(name) for name in names))
    return (*tensors, *scalars, 1 - clip, 1 + clip, 5.0, given.get("kl_coef", 0.0))


def nft_arguments(layout: str) -> tuple:
    """Those of naive.weighted_nft_loss, with every option."""
    batch = nft.Batch(BACKEND, layout)
    given = batch.options()
    names = ("weights", "mask", "step_weights", "ref_model_output")
    scalars = (batch.channel_dim % batch.output.ndim, True, True, False, 0.5, 5.0, 0.1)
    tensors = (batch.output, batch.old, batch.target, batch.advantages, batch.sigma, *(given[n] for n in names))
    return (*tensors, *scalars)


def wide(arguments: tuple) -> tuple:
    return tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments)


def differentiate(function: Callable, arguments: tuple, *rest: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    leaf = arguments[0].detach().requires_grad_()
    result = function(leaf, *arguments[1:], *rest)[0]
    return result.detach(), torch.autograd.grad(result.sum(), leaf)[0]


def hold_to_pytorch(operator: Callable, definition: Callable, arguments: tuple) -> None:
    """At most twice PyTorch's own error in float32, both against float64, and at most 1e-6.

    PyTorch's loss may happen to be exact; one unit in the last place of the samples' losses is always allowed.
    """
    got, pytorch = differentiate(operator, arguments, "triton"), differentiate(definition, arguments)
    exact = differentiate(definition, wide(arguments))
    per_sample = 14 if definition is naive.weighted_policy_loss else 12
    each, _ = definition(*wide(arguments[:per_sample]), True, *arguments[per_sample + 1 :])
    size = float(each.abs().mean())
    error, reference = (abs(float(loss) - float(exact[0])) / size for loss, _ in (got, pytorch))
    assert error <= min(1e-6, 2 * reference + torch.finfo(torch.float32).eps)
    error, reference = (float((grad - exact[1]).norm() / exact[1].norm()) for _, grad in (got, pytorch))
    assert error <= min(1e-6, 2 * reference)


@inner
@pytest.mark.parametrize("ratio", ["sample", "location"])
@pytest.mark.parametrize("every_option", [False, True], ids=["plain", "every_option"])
@pytest.mark.parametrize("layout", mostly_exhaustive(EVERY_OPTION, ["rows"]))
def test_errors_are_at_most_twice_pytorchs(layout: str, every_option: bool, ratio: str, poisoned: None) -> None:
    arguments = policy_arguments(make(BACKEND, layout, drift=0.01), ratio, every_option)
    hold_to_pytorch(ops.WEIGHTED_POLICY_LOSS, naive.weighted_policy_loss, arguments)


@inner
@pytest.mark.parametrize("layout", mostly_exhaustive(EVERY_OPTION, ["rows"]))
def test_nft_errors_are_at_most_twice_pytorchs(layout: str, poisoned: None) -> None:
    hold_to_pytorch(ops.WEIGHTED_NFT_LOSS, naive.weighted_nft_loss, nft_arguments(layout))


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
@pytest.mark.parametrize("ratio", ["sample", "location"])
def test_a_sample_without_a_location_contributes_nothing(ratio: str, poisoned: None) -> None:
    """The public function refuses such a mask on a CPU, but looks at none on a GPU."""
    problem = make(BACKEND, "rows", drift=0.01)
    for arguments, operator, definition in (
        (policy_arguments(problem, ratio, True), ops.WEIGHTED_POLICY_LOSS, naive.weighted_policy_loss),
        (nft_arguments("rows"), ops.WEIGHTED_NFT_LOSS, naive.weighted_nft_loss),
    ):
        mask = next(t for t in arguments if isinstance(t, Tensor) and t.dtype == torch.bool)
        mask[2] = False
        arguments[1][2] = torch.nan  # whatever lies there
        result, gradient = differentiate(operator, arguments, "triton")
        expected, _ = differentiate(definition, wide(arguments))
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)
        assert not gradient[2].any()
        assert bool(gradient[[0, 1, 3]].flatten(1).any(dim=1).all())
        assert bool(operator(*arguments, "triton")[1].isfinite().all())


@inner
@pytest.mark.parametrize("ratio", ["sample", "location"])
def test_programs_that_walk_over_tiles_find_the_same_loss(ratio: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for programs in (1024, BATCH):
        monkeypatch.setattr(triton_latents, "_PROGRAMS", programs)
        policy = policy_arguments(make(BACKEND, "packed", drift=0.01), ratio, True)
        nft_results = ops.WEIGHTED_NFT_LOSS(*nft_arguments("packed"), "triton")
        found.append([*ops.WEIGHTED_POLICY_LOSS(*policy, "triton"), *nft_results])
    shape = triton_latents.geometry(policy[0], 2)
    assert (shape.tiles, shape.tiles_to_add) == (2, 1)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


@inner
@pytest.mark.parametrize("shape", [(19, 2, 3), (1, 64, 33 * 32)], ids=["many_samples", "many_tiles"])
def test_all_samples_and_all_tiles_are_added_up(shape: tuple[int, int, int], poisoned: None) -> None:
    """More than the last program takes in one step."""
    output, sample, prev = torch.randn(3, *shape)
    advantages, old = torch.randn(shape[0]), torch.full((shape[0], shape[2]), -1.0)
    coefficients = torch.tensor([[1.0], [-0.1], [0.3], [0.2], [0.5], [1.0]])
    scalars = (1, True, False, False, 0.5, 1.5, 5.0, 0.0)
    arguments = (output, sample, prev, old, advantages, coefficients, *(None,) * 5, *scalars)
    results = ops.WEIGHTED_POLICY_LOSS(*arguments, "triton")
    expected = naive.weighted_policy_loss(*wide(arguments))
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
    for module in (triton_loss, triton_nft, triton_sampling):
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
        found.append([*differentiate(ops.WEIGHTED_POLICY_LOSS, arguments, "triton")])
        found[-1] += differentiate(ops.WEIGHTED_NFT_LOSS, nft_arguments("packed"), "triton")
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
