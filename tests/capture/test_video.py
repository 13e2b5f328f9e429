"""Maps of video models, on grids of (frames, rows, columns)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import BATCH, CASES, IMAGE, Case
from tiny_video_models import (
    FRAMES,
    GRID,
    HUNYUAN_VIDEO15,
    IN_QUOTES,
    PICTURE,
    TEXT,
    VIDEO,
    VIDEO_CASES,
    WAN_I2V,
    ltx2,
    wan_i2v_inputs,
    wan_inputs,
)

from star_kernels import allocate, flow_sde, sample_transition, total_variation, weighted_policy_loss
from star_kernels.capture import capture_maps, hunyuan_video, wan
from star_kernels.capture.averages import mean_maps

DOUBLES = {"ltx": "last", "ltx2": "last"}  # families whose pipelines double the batch


@torch.no_grad()
@pytest.mark.parametrize("name", VIDEO_CASES)
def test_maps_are_exact_and_outputs_the_same_with_and_without_guidance(name: str) -> None:
    case = VIDEO_CASES[name]
    model, inputs = case.make()
    output, expected = model(**inputs).sample, expected_maps(model, inputs, case, case.selection)
    with capture_maps(model, case.selection) as maps:
        captured = model(**inputs).sample
        torch.testing.assert_close(captured, output, rtol=1e-5, atol=1e-5)
        assert maps.value.shape == (BATCH, 2, *GRID)
        torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-6)
    if name not in DOUBLES:
        return
    doubled = {key: torch.cat([x, x]) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
    doubled["encoder_hidden_states"][:BATCH] = 0  # the unconditional half comes first
    output = model(**doubled).sample
    with capture_maps(model, case.selection) as maps:
        torch.testing.assert_close(model(**doubled).sample, output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_second_pass_for_guidance_is_left_out_by_disabling_the_capture() -> None:
    case = VIDEO_CASES["wan"]
    model, inputs = case.make()
    with capture_maps(model, case.selection) as maps:
        model(**inputs)
        conditional = maps.value
        maps.enabled = False
        model(**{**inputs, "encoder_hidden_states": torch.zeros_like(inputs["encoder_hidden_states"])})
        assert maps.value is conditional


@torch.no_grad()
@pytest.mark.parametrize("perturbed", [{"spatio_temporal_guidance_blocks": [0]}, {"isolate_modalities": True}])
def test_passes_of_ltx2_with_perturbed_attention_are_not_captured(perturbed: dict[str, Any]) -> None:
    case = VIDEO_CASES["ltx2"]
    model, inputs = Case(lambda: ltx2(perturbed_attn=True), case.inputs, case.rows, case.text, case.keys).make()
    with capture_maps(model, case.selection) as maps:
        model(**inputs)
        usual = maps.value
        model(**{**inputs, **perturbed})
        assert maps.value is usual
    assert not model._forward_hooks


@torch.no_grad()
def test_tokens_that_ltx2_appends_to_the_video_are_dropped_and_fewer_are_an_error() -> None:
    case = VIDEO_CASES["ltx2"]
    model, inputs = case.make()
    coordinates = model.rope.prepare_video_coords(BATCH, FRAMES + 1, *GRID[1:], "cpu")
    longer = torch.cat([inputs["hidden_states"], torch.randn(BATCH, VIDEO // FRAMES, 4)], dim=1)
    inputs = {**inputs, "hidden_states": longer, "video_coords": coordinates}
    with capture_maps(model, case.selection) as maps:
        model(**inputs)
    torch.testing.assert_close(maps.value, expected_maps(model, inputs, case, case.selection), rtol=0, atol=1e-6)
    with (
        pytest.raises(ValueError, match="hidden_states must have at least the 100 tokens of num_frames, height and"),
        capture_maps(model, case.selection),
    ):
        model(**{**inputs, "num_frames": FRAMES + 2})


@torch.no_grad()
def test_a_video_without_its_size_needs_rows_and_a_grid() -> None:
    """As LTXConditionPipeline calls the transformer, with tokens before the video."""
    case = VIDEO_CASES["ltx"]
    model, inputs = case.make()
    coordinates = torch.rand(BATCH, 3, VIDEO)
    for name in ("num_frames", "height", "width"):
        del inputs[name]
    inputs["video_coords"] = coordinates
    with capture_maps(model, case.selection) as maps:
        model(**inputs)
    with pytest.raises(ValueError, match="called without num_frames, height and width, as LTXConditionPipeline does"):
        maps.value  # noqa: B018
    whole = expected_maps(model, inputs, case, case.selection)
    options: dict[str, Any] = {"rows": (VIDEO // FRAMES, 2 * VIDEO // FRAMES), "grid": (2, *GRID[1:])}
    with capture_maps(model, case.selection, **options) as maps:
        model(**inputs)
    torch.testing.assert_close(maps.value, whole[:, :, 1:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_any_model_takes_a_grid_of_frames_rows_and_columns() -> None:
    case = CASES["any-joint"]
    model, inputs = case.make()
    with capture_maps(model, case.selection, cfg=None, **case.options) as maps:
        model(**inputs)
    image = maps.value
    with capture_maps(model, case.selection, cfg=None, rows=case.rows, grid=[2, 3, IMAGE // 6]) as maps:
        model(**inputs)
    assert torch.equal(maps.value, image.reshape(BATCH, 2, 2, 3, IMAGE // 6))
    with pytest.raises(ValueError, match="grid must have the 60 positions of rows, got 2 x 3 x 5"):
        capture_maps(model, case.selection, rows=case.rows, grid=(2, 3, 5)).__enter__()


@torch.no_grad()
def test_maps_of_a_video_become_weights_of_its_latents() -> None:
    """One weight for each patch of two by two latent positions."""
    case = VIDEO_CASES["wan"]
    model, inputs = case.make()
    with capture_maps(model, case.selection) as maps:
        velocity = model(**inputs).sample
    weights = allocate(maps.value[:, 0], layout="bfhw")
    assert weights.shape == (BATCH, *GRID)
    steps = maps.value[:, :1].expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(total_variation(steps, 2 * steps, layout="bsfhw"), torch.zeros(BATCH, 2))
    transition = flow_sde(torch.tensor(0.8), torch.tensor(0.7), sigma_max=0.98)
    sample = inputs["hidden_states"]
    prev_sample, log_prob = sample_transition(velocity, sample, transition)
    assert log_prob.shape == (BATCH, FRAMES, 2 * GRID[1], 2 * GRID[2])
    fine = weights.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    arguments = velocity + 0.01 * sample, sample, prev_sample, log_prob, torch.tensor([1.0, -0.5]), transition
    losses = [weighted_policy_loss(*arguments, weights=given, ratio="location").loss for given in (weights, fine)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-7)


def test_blocks_of_several_resolutions_are_interpolated_in_all_three_dimensions() -> None:
    grids = {8: (2, 2, 2), 64: (4, 4, 4)}
    coarse = torch.arange(8.0).reshape(1, 1, 8)
    mean = mean_maps([torch.zeros(1, 1, 64), coarse], grids.__getitem__)
    assert mean.shape == (1, 1, 4, 4, 4)
    corners = mean[0, 0, ::3, ::3, ::3].flatten()
    torch.testing.assert_close(corners, torch.arange(8.0) / 2)


def test_models_of_wan_with_image_keys_say_which_call_has_the_text() -> None:
    for case, call in ((VIDEO_CASES["wan"], 0), (WAN_I2V, 1)):
        model, inputs = case.make()
        assert [wan.FAMILY.call_of(attention) for attention in wan.attentions(model)] == [call, call]
        tokens = wan.image(model, inputs)
        assert (tokens.keys, tokens.text) == (case.keys, (0, case.keys))
    with pytest.raises(ValueError, match="encoder_hidden_states must have 512 tokens in a Wan model with image keys"):
        wan.image(model, {**wan_i2v_inputs(), **wan_inputs(TEXT)})


def test_the_text_of_hunyuan_video_15_follows_the_tokens_of_the_image_and_of_quoted_text() -> None:
    model, inputs = HUNYUAN_VIDEO15.make()
    tokens = hunyuan_video.image_15(model, inputs)
    assert (tokens.text, tokens.keys) == ((VIDEO + IN_QUOTES, TEXT), HUNYUAN_VIDEO15.keys)
    with_image = {**inputs, "image_embeds": torch.ones(BATCH, PICTURE, 8)}
    assert hunyuan_video.image_15(model, with_image).text == (VIDEO + PICTURE + IN_QUOTES, TEXT)
    inputs["encoder_attention_mask_2"] = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"must have the same number of tokens of text in quotation marks.*got \[2, 1"):
        hunyuan_video.image_15(model, inputs)
