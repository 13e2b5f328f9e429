"""Captured maps of every family equal those of the reference, and capturing leaves outputs and gradients unchanged."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import BATCH, CASES, COLUMNS, IMAGE, ROWS, TEXT, flux_inputs
from tiny_video_models import VIDEO_CASES

from star_kernels.capture import capture_maps
from star_kernels.capture.cross_attention import _at_resolution
from star_kernels.capture.flux import image as _image

FAMILIES = {**CASES, **VIDEO_CASES}


@pytest.fixture(params=FAMILIES)
def case(request):
    return FAMILIES[request.param]


def processors(model):
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def hooks(model):
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


@torch.no_grad()
def test_maps_are_those_of_the_materialised_softmax(case):
    model, inputs = case.make()
    with capture_maps(model, case.selection, cfg=None, **case.options) as maps:
        model(**inputs)
    expected = expected_maps(model, inputs, case, case.selection)
    assert maps.value.shape == (BATCH, 2, *case.grid)
    assert maps.value.dtype == torch.float32
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)
    first = expected[:, 0].flatten(1)
    assert (first.std(dim=1) / first.mean(dim=1)).min() > 0.01  # the maps are not flat
    assert not maps.value[1, 1].any()  # an empty phrase


def test_outputs_and_gradients_are_those_without_capture(case):
    model, inputs = case.make()

    def run():
        model.zero_grad()
        output = model(**inputs).sample
        output.square().mean().backward()
        return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    output, gradients = run()
    with capture_maps(model, case.selection, cfg=None, **case.options) as maps:
        captured_output, captured_gradients = run()
    torch.testing.assert_close(captured_output, output, rtol=1e-5, atol=1e-5)
    assert captured_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            captured_gradients[name], gradient, rtol=1e-3, atol=1e-5 * (1 + gradient.abs().max())
        )
    assert not maps.value.requires_grad


@torch.no_grad()
def test_the_model_is_as_it_was_after_an_exception(case):
    model, inputs = case.make()
    output = model(**inputs).sample
    before, state = processors(model), [copy.copy(vars(p)) for p in processors(model)]
    hooks_before = hooks(model)

    def fail():
        model(**inputs)
        assert sum(hooks(model)) > sum(hooks_before)
        raise KeyError

    with pytest.raises(KeyError), capture_maps(model, case.selection, cfg=None, **case.options):
        fail()
    assert all(a is b for a, b in zip(before, processors(model), strict=True))
    assert state == [vars(p) for p in before]
    assert hooks(model) == hooks_before
    assert torch.equal(model(**inputs).sample, output)


@torch.no_grad()
def test_maps_are_the_mean_over_the_chosen_blocks():
    case = CASES["flux"]
    model, inputs = case.make()
    for blocks in ([0], [2], [1, -3]):
        with capture_maps(model, case.selection, cfg=None, blocks=blocks) as maps:
            model(**inputs)
        expected = expected_maps(model, inputs, case, case.selection, blocks)
        torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_coarse_levels_of_a_unet_keep_their_own_grid():
    case = CASES["sd"]
    model, inputs = case.make()
    with capture_maps(model, case.selection, cfg=None, blocks=[1, 2]) as maps:
        model(**inputs)
    assert maps.value.shape == (BATCH, 2, ROWS // 2, COLUMNS // 2)
    odd = {**inputs, "sample": torch.randn(BATCH, 4, 5, 7)}
    with capture_maps(model, case.selection, cfg=None) as maps:
        model(**odd)
    assert maps.value.shape == (BATCH, 2, 5, 7)


@torch.no_grad()
@pytest.mark.parametrize("family", ["flux", "flux2"])
def test_tokens_of_reference_images_are_dropped(family):
    case = CASES[family]
    model, inputs = case.make()
    references = torch.randn(BATCH, 20, 4)
    ids = inputs["img_ids"]
    reference_ids = ids[..., :20, :].clone()
    reference_ids[..., 0] = 1
    inputs = {
        **inputs,
        "hidden_states": torch.cat([inputs["hidden_states"], references], dim=1),
        "img_ids": torch.cat([ids, reference_ids], dim=-2),
    }
    with capture_maps(model, case.selection, cfg=None) as maps:
        model(**inputs)
    longer = type(case)(case.build, case.inputs, case.rows, case.text, keys=TEXT + IMAGE + 20)
    expected = expected_maps(model, inputs, longer, case.selection)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_ids_that_are_modified_between_passes_give_the_new_grid(mode):
    case = CASES["flux"]
    model, inputs = case.make()
    with mode(), capture_maps(model, case.selection) as maps:
        inputs = {name: value.clone() for name, value in inputs.items()}
        ids = inputs["img_ids"]
        model(**inputs)
        assert maps.value.shape[2:] == (ROWS, COLUMNS)
        model(**inputs)
        assert maps.value.shape[2:] == (ROWS, COLUMNS)
        ids[:, 1], ids[:, 2] = torch.arange(IMAGE) // ROWS, torch.arange(IMAGE) % ROWS  # portrait
        model(**inputs)
        ids.zero_()  # modified again before the maps are read
        assert maps.value.shape[2:] == (COLUMNS, ROWS)


@torch.no_grad()
def test_ids_are_read_once():
    model, inputs = CASES["flux"].make()
    ids = inputs["img_ids"]
    first, again = (_image(model, inputs).grid for _ in range(2))
    assert first is again
    ids += 0
    assert _image(model, inputs).grid is not first


@torch.no_grad()
def test_rows_and_grid_can_be_chosen():
    model, _ = CASES["flux"].make()
    inputs = flux_inputs()
    with capture_maps(model, CASES["flux"].selection, cfg=None) as maps:
        model(**inputs)
    whole = maps.value
    options = {"rows": (TEXT + COLUMNS, 2 * COLUMNS), "grid": (2, COLUMNS)}
    with capture_maps(model, CASES["flux"].selection, cfg=None, **options) as maps:
        model(**inputs)
    assert torch.equal(maps.value, whole[:, :, 1:3])


@torch.no_grad()
def test_padding_of_the_text_has_no_attention():
    case = CASES["qwen-image"]
    model, inputs = case.make()
    padding = case.selection.shift(TEXT - 1 - 3)  # the last token, where the second prompt is padded
    with capture_maps(model, padding, cfg=None) as maps:
        model(**inputs)
    assert not maps.value[1, 0].any()
    assert maps.value[0].any()


@torch.no_grad()
def test_several_frames_are_an_error():
    """Maps have one grid, that of one frame."""
    model, inputs = CASES["qwen-image"].make()
    inputs["img_shapes"] = [[(2, ROWS // 2, COLUMNS)]] * BATCH
    with (
        pytest.raises(ValueError, match="img_shapes must be shapes of images, with one frame each, got 2 frames"),
        capture_maps(model, CASES["qwen-image"].selection, cfg=None),
    ):
        model(**inputs)


def test_a_unets_resolution_follows_from_the_number_of_its_queries():
    assert _at_resolution((9, 6), 54) == (9, 6)
    assert _at_resolution((9, 6), 15) == (5, 3)  # odd sides are rounded up
    with pytest.raises(ValueError, match="a UNet with a latent of 9 x 6 has no resolution of 16 positions"):
        _at_resolution((9, 6), 16)
