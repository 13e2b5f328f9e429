"""The Triton kernels of the policy under the contract of every backend, run by Triton's interpreter on a CPU.

The tests of this file run in a process of their own, whose output is shown if one fails. The contract's tests are
called here with a selection of their parameters; a machine with a GPU runs all of them. Rounding to bfloat16 is tested
on such a machine only: the interpreter truncates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_nft_loss as nft
import test_policy_dense as dense
import test_policy_kl_mask as kl_mask
import test_policy_loss as loss
import test_policy_options as options
import test_policy_phrases as phrases
import test_policy_zero_terms as zero_terms
import test_sampling as sampling
import test_triton_transitions as transitions
import torch
from tiers import mostly_exhaustive
from triton_interpreter import TIERS, inner, outer, require_interpreter, run_interpreted
from triton_policy import BACKEND, prepare

require_interpreter()


@outer
@pytest.mark.parametrize("tier", TIERS)
def test_in_the_interpreter(tier: str) -> None:
    run_interpreted(__file__, tier)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)


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
    *(
        (kl_mask.test_loss_and_gradient_are_the_published_ones, (layout, credit, ratio, masking))
        for layout, credit, ratio, masking in (
            ("image_odd", "plain", "sample", False),
            ("packed", "weights", "location", True),
            ("packed", "dense", "sample", True),
            ("image_odd", "dense", "location", False),
            ("packed", "phrases", "sample", False),
            ("image_odd", "phrases", "location", True),
        )
    ),
    (kl_mask.test_a_ratio_that_overflows_has_no_gradient_where_it_is_masked, ("sample",)),
    (kl_mask.test_a_ratio_that_overflows_has_no_gradient_where_it_is_masked, ("location",)),
    (phrases.test_the_loss_is_the_sum_over_phrases_with_one_penalty, ("packed", "location")),
    (phrases.test_one_phrase_is_the_loss_without_phrases_to_the_last_bit, ("sample",)),
    (phrases.test_one_phrase_is_the_loss_without_phrases_to_the_last_bit, ("location",)),
    (phrases.test_an_advantage_of_zero_removes_a_phrase, ()),
    (dense.test_loss_and_gradient_are_the_written_objective, ("image_odd", "sample")),
    (dense.test_loss_and_gradient_are_the_written_objective, ("packed", "location")),
    (dense.test_a_constant_advantage_is_that_of_the_sample, ("sample",)),
    (dense.test_advantages_are_clamped, ("location",)),
    (dense.test_locations_under_the_mask_reach_neither_loss_nor_gradient, ("sample",)),
    (dense.test_nan_stays_visible_and_out_of_the_gradients_of_other_samples, ("sample",)),
    (dense.test_nan_stays_visible_and_out_of_the_gradients_of_other_samples, ("location",)),
    (dense.test_an_infinite_ratio_of_positive_advantages_is_clipped, ()),
    *(
        (zero_terms.test_an_advantage_of_zero_contributes_nothing, (advantages, options, same, ratio))
        for advantages, options, same in zero_terms.ZERO_ADVANTAGES.values()
        for ratio in ("sample", "location")
    ),
    *(
        (zero_terms.test_a_weight_of_zero_at_a_location_contributes_nothing, c)
        for c in zero_terms.ZERO_WEIGHTS.values()
    ),
    *(
        (zero_terms.test_a_ratio_that_is_not_a_number_stays_visible, (*case, ratio))
        for case in zero_terms.NOT_A_NUMBER.values()
        for ratio in ("sample", "location")
    ),
    (nft.test_loss_and_gradient_are_the_written_objective_under_every_option, ("image_odd", True)),
    (nft.test_loss_and_gradient_are_the_written_objective_under_every_option, ("channels_between", False)),
    (nft.test_each_option_alone, ("mask",)),
    (nft.test_uniform_weights_equal_no_weights_bit_by_bit, ("packed",)),
    (nft.test_weights_on_a_patch_grid_equal_the_upsampled_ones, ("image", [12, 10])),
    (nft.test_weights_on_a_patch_grid_equal_the_upsampled_ones, ("video", [3, 6, 7])),
    (nft.test_metrics_are_what_they_say, ()),
    (nft.test_the_least_error_keeps_the_loss_of_a_perfect_model_finite, ()),
    (nft.test_whatever_lies_under_the_mask_reaches_nothing, ("video",)),
    (nft.test_nan_in_one_sample_stays_visible_and_out_of_the_others_gradients, ("target",)),
    (nft.test_16_bit_outputs_give_a_gradient_with_one_rounding, ("video", HALF)),
    (sampling.test_step_and_log_prob_are_those_of_the_gaussian, ("image", torch.float32, torch.float32)),
    (sampling.test_step_and_log_prob_are_those_of_the_gaussian, ("packed", HALF, torch.float32)),
    (sampling.test_step_and_log_prob_are_those_of_the_gaussian, ("video_frames_first", torch.float32, HALF)),
    (sampling.test_step_and_log_prob_are_those_of_the_gaussian, ("many_channels", HALF, HALF)),
    (sampling.test_every_16_bit_latent_survives_a_step_that_changes_nothing, (HALF,)),
    (transitions.test_the_kernel_rounds_the_reference_once, ()),
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
    kl_mask.test_loss_and_gradient_are_the_published_ones: ("packed", "weights", "location", True),
    phrases.test_one_phrase_is_the_loss_without_phrases_to_the_last_bit: ("sample",),
    dense.test_loss_and_gradient_are_the_written_objective: ("packed", "location"),
    nft.test_loss_and_gradient_are_the_written_objective_under_every_option: ("channels_between", False),
    sampling.test_step_and_log_prob_are_those_of_the_gaussian: ("packed", HALF, torch.float32),
    transitions.test_the_kernel_rounds_the_reference_once: (),
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
