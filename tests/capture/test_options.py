"""Options of a capture, handles without a context, and error messages."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import BATCH, CASES, COLUMNS, IMAGE, ROWS, cogview4

from star_kernels import TokenSelection
from star_kernels.capture import attach_maps, capture_maps, detach_maps

CASE = CASES["sd3.5"]


@pytest.fixture
def model_and_inputs():
    return CASE.make()


def other_selection():
    return TokenSelection.from_positions([[5, 6], [0]])


def doubled(inputs):
    return {name: torch.cat([value.flip(0) + 1, value]) for name, value in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("cfg", ["last", "first"])
def test_one_half_of_a_doubled_batch_is_captured(model_and_inputs, cfg):
    model, inputs = model_and_inputs
    batch = doubled(inputs)
    with capture_maps(model, CASE.selection, cfg=cfg) as maps:
        model(**batch)
    half = slice(BATCH, None) if cfg == "last" else slice(BATCH)
    expected = expected_maps(model, {name: v[half] for name, v in batch.items()}, CASE, CASE.selection)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_setting_the_selection_of_a_handle_changes_no_processor(model_and_inputs):
    model, inputs = model_and_inputs
    selections = CASE.selection, other_selection()
    expected = [expected_maps(model, inputs, CASE, selection) for selection in selections]
    handle = attach_maps(model, cfg=None)
    processors = [block.attn.processor for block in model.transformer_blocks]
    model(**inputs)
    with pytest.raises(RuntimeError, match=r"no maps yet: 0 of 3 chosen blocks have run; set a selection"):
        _ = handle.value
    for selection, value in zip(selections, expected, strict=True):
        handle.selection = selection
        model(**inputs)
        torch.testing.assert_close(handle.value, value, rtol=0, atol=1e-5)
    assert all(a is b.attn.processor for a, b in zip(processors, model.transformer_blocks, strict=True))
    handle.remove()
    handle.remove()
    model(**inputs)
    assert handle.value is handle.value  # maps stay readable


@torch.no_grad()
def test_maps_are_of_the_latest_captured_pass(model_and_inputs):
    model, inputs = model_and_inputs
    other = {**inputs, "hidden_states": inputs["hidden_states"].flip(-1)}
    with attach_maps(model, CASE.selection, cfg=None) as maps:
        model(**inputs)
        first = maps.value
        maps.enabled = False
        model(**other)
        assert torch.equal(maps.value, first)
        maps.enabled = True
        model(**other)
        second = maps.take()
        assert not torch.equal(first, second)
        with pytest.raises(RuntimeError, match="no maps yet"):
            maps.take()
        model(**inputs)
    assert torch.equal(maps.value, first)


@torch.no_grad()
def test_a_pass_that_fails_leaves_no_maps_and_the_next_is_complete(model_and_inputs):
    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection, cfg=None) as maps:
        model(**inputs)
        expected = maps.value
        last = model.transformer_blocks[-1]
        hook = last.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        hook.remove()
        with pytest.raises(RuntimeError, match="no maps yet: 2 of 3"):
            _ = maps.value
        model(**inputs)
        assert torch.equal(maps.value, expected)


@torch.no_grad()
def test_a_grid_must_fit_the_rows(model_and_inputs):
    model, inputs = model_and_inputs
    with pytest.raises(ValueError, match="grid must have the 6 positions of rows, got 2 x 4"):
        attach_maps(model, rows=(4, 6), grid=(2, 4))
    wrong = r"grid must be that of the image in this pass, 6 x 10, got 7 x 10: leave it out, or pass rows too"
    with capture_maps(model, CASE.selection, grid=(ROWS + 1, COLUMNS)), pytest.raises(ValueError, match=wrong):
        model(**inputs)
    case = CASES["flux"]  # the grid is that of img_ids
    model, inputs = case.make()
    with capture_maps(model, case.selection, grid=(ROWS + 1, COLUMNS)) as maps:
        model(**inputs)
    with pytest.raises(ValueError, match=wrong):
        _ = maps.value


@torch.no_grad()
def test_a_backend_set_during_the_capture_is_kept():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    case = CASES["flux"]
    model, inputs = case.make()
    active = registry.get_active_backend()[0]
    try:
        with capture_maps(model, case.selection, cfg=None):
            model.set_attention_backend("_native_math")
            with warnings.catch_warnings(action="ignore"):  # of a second pass
                model(**inputs)
        assert {block.attn.processor._attention_backend for block in model.transformer_blocks} == {"_native_math"}
    finally:
        registry.set_active_backend(active)


def enter(*arguments, **options):
    with capture_maps(*arguments, **options) as maps:
        return maps


def test_bad_options_are_named(model_and_inputs):
    model, _ = model_and_inputs
    selection = CASE.selection
    for wrong in ([1], TokenSelection):
        with pytest.raises(TypeError, match=r"selection must be a TokenSelection, got (list|type)"):
            enter(model, wrong)
    with pytest.raises(ValueError, match="cfg must be 'auto', 'last', 'first' or None, got 'both'"):
        enter(model, selection, cfg="both")
    with pytest.raises(TypeError, match="detach must be True or False, got 'no'"):
        enter(model, selection, detach="no")
    for blocks in ("some", [], [3], [0, 0], [0, -3], [0.5], 1, [True]):
        with pytest.raises(ValueError, match="blocks must be 'all', 'default' or distinct indices below 3"):
            enter(model, selection, blocks=blocks)
    for name in ("rows", "grid"):
        for pair in ((1,), (1, -2), (1, 2.5), 5, (True, 60)):
            with pytest.raises(ValueError, match=f"{name} must be a pair of integers of at least 0"):
                enter(model, selection, **{name: pair})
    assert not model._forward_pre_hooks
    assert not hasattr(model.transformer_blocks[0].attn.processor, "_star_attention")


@torch.no_grad()
def test_options_may_be_integers_of_numpy_and_lists(model_and_inputs):
    model, inputs = model_and_inputs
    rows, grid = [np.int64(0), np.int64(IMAGE)], np.array([ROWS, COLUMNS])
    for blocks in (np.array([0, 2]), torch.tensor([0, 2]), [np.int64(0), 2]):
        with capture_maps(model, CASE.selection, blocks=blocks, rows=rows, grid=grid) as maps:
            model(**inputs)
        assert maps.value.shape == (2, 2, ROWS, COLUMNS)


@pytest.mark.parametrize(("family", "missing"), [("flux", "img_ids"), ("qwen-image", "img_shapes")])
def test_a_missing_argument_that_the_capture_reads_is_named(family, missing):
    case = CASES[family]
    model, inputs = case.make()
    del inputs[missing]
    with capture_maps(model, case.selection), pytest.raises(ValueError, match=f"must be called with '{missing}'"):
        model(**inputs)


def test_setting_a_selection_of_the_wrong_type_is_an_error(model_and_inputs):
    model, _ = model_and_inputs
    selection = CASE.selection
    with attach_maps(model, selection, cfg=None) as handle:
        with pytest.raises(TypeError, match="selection must be a TokenSelection, got list"):
            handle.selection = [1]
        with pytest.raises(
            TypeError, match=r"got tuple; use its first element, as in selection, names = select_tokens"
        ):
            handle.selection = (selection, [])
        assert handle.selection is selection


def test_the_batch_must_be_that_of_the_selection(model_and_inputs):
    model, inputs = model_and_inputs
    with (
        pytest.raises(ValueError, match=r"batch of 4 .twice the selection's 2, for cfg='last'.*, got 2"),
        capture_maps(model, CASE.selection, cfg="last"),
    ):
        model(**inputs)
    with (
        pytest.raises(ValueError, match=r"batch of 2, the selection's, got 4; for several images of each prompt"),
        capture_maps(model, CASE.selection, cfg=None),
    ):
        model(**doubled(inputs))


def test_a_selection_on_another_device_is_an_error(model_and_inputs):
    model, inputs = model_and_inputs
    with (
        pytest.raises(ValueError, match="selection must be on the device of query, cpu, got meta"),
        capture_maps(model, CASE.selection.to("meta"), cfg=None),
    ):
        model(**inputs)


def test_a_block_is_captured_once(model_and_inputs):
    model, inputs = model_and_inputs
    with attach_maps(model, CASE.selection, cfg=None, blocks=[0]) as first:
        with pytest.raises(ValueError, match=r"captured already, at transformer_blocks\.0\.attn: .*detach_maps"):
            attach_maps(model, CASE.selection, blocks=[1, 0])
        with attach_maps(model, other_selection(), cfg=None, blocks=[1, 2]) as second, torch.no_grad():
            model(**inputs)
    assert first.value.shape == (BATCH, 2, ROWS, COLUMNS)
    assert second.value.shape == (BATCH, 1, ROWS, COLUMNS)


def test_captures_without_a_handle_can_be_removed(model_and_inputs):
    model, inputs = model_and_inputs
    wrapped = torch.compile(model, backend="eager")  # the wrapper does not matter
    before = [block.attn.processor for block in model.transformer_blocks]
    attach_maps(model, CASE.selection, blocks=[0])
    attach_maps(model, other_selection(), blocks=[1, 2])
    assert detach_maps(wrapped) == 2
    assert detach_maps(model) == 0
    assert all(a is b.attn.processor for a, b in zip(before, model.transformer_blocks, strict=True))
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    with attach_maps(model, CASE.selection) as maps, torch.no_grad():
        model(**inputs)
    assert maps.ready


@torch.no_grad()
def test_recording_processors_set_again_after_the_capture_record_nothing(model_and_inputs):
    """unfuse_qkv_projections sets them again if fuse_qkv_projections ran within the capture."""
    model, inputs = model_and_inputs
    output = model(**inputs).sample
    expected = expected_maps(model, inputs, CASE, CASE.selection)
    with capture_maps(model, CASE.selection) as maps:
        kept = model.attn_processors
        model(**inputs)
    model.set_attn_processor(kept)
    assert torch.equal(model(**inputs).sample, output)
    model(**doubled(inputs))
    with capture_maps(model, CASE.selection) as maps:
        model(**inputs)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)


def test_an_unknown_model_is_named_with_its_attention_processors():
    with pytest.raises(
        TypeError,
        match=r"transformer must be one of SD3Transformer2DModel, .*, got CogView4Transformer2DModel\..*"
        r"CogView4AttnProcessor \(2\)\. Pass rows=.* and grid=.*docs/adding-a-model.md",
    ):
        attach_maps(cogview4())
    with pytest.raises(TypeError, match=r"got Linear\. It has no attention processors.*docs/adding-a-model.md"):
        attach_maps(nn.Linear(1, 1), rows=(0, 1), grid=(1, 1))
    with pytest.raises(TypeError, match="CogView4AttnProcessor"):
        attach_maps(cogview4(), rows=(0, 1))


def test_a_pipeline_in_place_of_its_model_is_an_error_that_names_the_model():
    with pytest.raises(
        TypeError, match=r"transformer must be a model, got SimpleNamespace; pass its unet, pipeline\.unet$"
    ):
        attach_maps(SimpleNamespace(unet=nn.Linear(1, 1)), CASE.selection)
    with pytest.raises(TypeError, match=r"transformer must be a model, got str$"):
        attach_maps("small", CASE.selection)


def test_a_processor_with_another_order_of_tokens_is_an_error(model_and_inputs):
    model, _ = model_and_inputs

    class Mine:
        def __call__(self, *args, **kwargs):
            raise AssertionError

    model.transformer_blocks[1].attn.processor = Mine()
    with pytest.raises(TypeError, match=r"transformer_blocks\.1\.attn must have .* JointAttnProcessor2_0 .*, got Mine"):
        attach_maps(model, CASE.selection)
