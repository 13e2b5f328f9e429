"""Wrong uses of a capture that could give the map of something else without a word: each is an error, or right."""

import copy
import pickle
import threading

import pytest
import torch

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import BATCH, CASES, COLUMNS, IMAGE, ROWS, TEXT

from star_kernels import TokenSelection
from star_kernels.capture import attach_maps, capture_maps, cross_attention
from star_kernels.capture.given_tokens import GivenTokens

CASE = CASES["sd3"]


@pytest.fixture
def model_and_inputs():
    return CASE.make()


@pytest.fixture(autouse=True)
def without_gradients(request):
    with torch.set_grad_enabled("backward" in request.node.name):
        yield


def other(inputs):
    return {**inputs, "hidden_states": -inputs["hidden_states"]}


def doubled(inputs):
    return {name: torch.cat([value, value]) for name, value in inputs.items()}


def same(value, model, inputs, case=CASE, selection=None):
    expected = expected_maps(model, inputs, case, selection or case.selection)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


IN_PLACE = {
    "index": lambda selection: selection.index.sub_(30),  # image tokens, without being read again
    "weight": lambda selection: selection.weight.fill_(torch.nan),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("guided", [False, True])
def test_a_selection_changed_in_place_is_an_error(change, guided, model_and_inputs):
    model, inputs = model_and_inputs
    batch, selection = doubled(inputs) if guided else inputs, CASE.selection
    with capture_maps(model, selection) as maps:
        model(**batch)
        change(selection)
        with pytest.raises(RuntimeError, match=r"TokenSelection were modified in place .* make another selection"):
            model(**batch)
        assert not maps.ready
        maps.selection = CASE.selection
        model(**batch)
        value = maps.value
    same(value, model, inputs)


@pytest.mark.parametrize("derive", [lambda s: s.to("cpu"), lambda s: s.shift(0), lambda s: s.among_empty(1, 1)])
def test_no_selection_is_derived_from_one_that_was_changed_in_place(derive):
    selection = CASE.selection
    selection.index.sub_(30)
    with pytest.raises(RuntimeError, match="modified in place"):
        derive(selection)


def test_copies_of_a_selection_are_as_good_as_the_selection(model_and_inputs):
    model, inputs = model_and_inputs
    selection = TokenSelection(CASE.selection.index.clone().add_(0), CASE.selection.weight, text_length=TEXT)
    for copied in (copy.copy(selection), copy.deepcopy(selection), pickle.loads(pickle.dumps(selection))):
        assert (copied.text_length, copied.first, copied.last) == (
            selection.text_length,
            selection.first,
            selection.last,
        )
        with capture_maps(model, copied) as maps:
            model(**inputs)
        same(maps.value, model, inputs)


def test_a_selection_replaced_between_forward_and_backward_keeps_the_gradients_of_the_pass(model_and_inputs):
    model, inputs = model_and_inputs
    latent = inputs["hidden_states"].requires_grad_()
    weights = torch.linspace(0, 1, BATCH * 2 * IMAGE).view(BATCH, 2, ROWS, COLUMNS)
    (expected,) = torch.autograd.grad((expected_maps(model, inputs, CASE, CASE.selection) * weights).sum(), latent)
    model.requires_grad_(False)
    with attach_maps(model, CASE.selection, detach=False) as maps:
        model(**inputs)
        loss = (maps.value * weights).sum()
        maps.selection = CASE.selection.shift(2)
        maps.enabled = False
        (gradient,) = torch.autograd.grad(loss, latent)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_a_selection_changed_in_place_before_backward_is_an_error():
    case = CASES["flux"]  # whose text comes first, so that positions of the text are positions of keys
    model, inputs = case.make()
    inputs["hidden_states"].requires_grad_()
    selection = case.selection
    with attach_maps(model, selection, detach=False) as maps:
        model(**inputs)
        selection.index.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            maps.value.sum().backward()


@pytest.mark.parametrize("change", ["enabled", "selection", "remove"])
def test_a_change_in_the_middle_of_a_pass_applies_to_the_next(change, model_and_inputs):
    model, inputs = model_and_inputs

    def in_the_middle(module, arguments):
        hook.remove()
        if change == "enabled":
            maps.enabled = False
        elif change == "selection":
            maps.selection = CASE.selection.shift(1)
        else:
            maps.remove()

    hook = model.transformer_blocks[1].register_forward_pre_hook(in_the_middle)
    maps = attach_maps(model, CASE.selection)
    model(**inputs)
    if change == "remove":
        with pytest.raises(RuntimeError, match="no maps yet: 1 of 3"):
            _ = maps.value
    else:
        value = maps.value
        maps.remove()
        same(value, model, inputs)


def test_a_handle_that_was_removed_captures_nothing_more(model_and_inputs):
    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection) as maps:
        model(**inputs)
    value = maps.value
    with pytest.raises(RuntimeError, match="this capture was removed and captures no more passes: attach another"):
        maps.selection = CASE.selection
    with pytest.raises(RuntimeError, match="this capture was removed"), maps:
        pass
    maps.selection = None
    assert maps.value is value


def test_attributes_that_are_not_options_cannot_be_set(model_and_inputs):
    model, _ = model_and_inputs
    with capture_maps(model, CASE.selection) as maps:
        with pytest.raises(AttributeError, match="no attribute 'selecton'; selection and enabled can be set"):
            maps.selecton = CASE.selection
        for name in ("blocks", "value", "ready"):
            with pytest.raises(AttributeError):
                setattr(maps, name, (0,))
        with pytest.raises(TypeError, match="enabled must be True or False, got 'no'"):
            maps.enabled = "no"


def test_a_call_of_forward_past_the_hooks_is_an_error_when_maps_are_read(model_and_inputs):
    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection) as maps:
        model.forward(**inputs)
        with pytest.raises(RuntimeError, match="no maps yet: 0 of 3"):
            _ = maps.value
        model(**inputs)
        model.forward(**other(inputs))
        assert not maps.ready
        for read in (lambda: maps.value, maps.take):
            with pytest.raises(RuntimeError, match=r"a call that the capture did not see: call the transformer itself"):
                read()
        model(**inputs)
        model.transformer_blocks[0].attn(torch.zeros(2, 60, 32), torch.zeros(2, 7, 32))  # one block, on its own
        value = maps.value
    same(value, model, inputs)


def test_blocks_recomputed_for_backward_are_no_call_past_the_hooks(model_and_inputs):
    from torch.utils.checkpoint import checkpoint

    model, inputs = model_and_inputs
    for block in model.transformer_blocks:
        block.forward = lambda *args, own=block.forward, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs)
    with capture_maps(model, CASE.selection) as maps:
        model(**inputs).sample.square().mean().backward()
        assert maps.ready
        value = maps.value
    with torch.no_grad():
        same(value, model, inputs)


def test_a_block_exchanged_during_the_capture_is_an_error(model_and_inputs):
    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection) as maps:
        model(**inputs)
        model.transformer_blocks[1] = copy.deepcopy(model.transformer_blocks[1])
        with pytest.raises(RuntimeError, match=r"no maps from transformer_blocks\.1\.attn: it did not run"):
            model(**inputs)
        del model.transformer_blocks[2]
        with pytest.raises(RuntimeError, match=r"transformer_blocks\.2\.attn: it did not run"):
            model(**inputs)
        assert not maps.ready


def test_another_resolution_is_followed():
    model, inputs = CASE.make()
    wide = {**inputs, "hidden_states": torch.randn(BATCH, 4, 2 * ROWS, 4 * COLUMNS)}
    with capture_maps(model, CASE.selection) as maps:
        model(**wide)
        assert maps.value.shape[2:] == (ROWS, 2 * COLUMNS)
    turned = {**inputs, "hidden_states": torch.randn(BATCH, 4, 2 * COLUMNS, 2 * ROWS)}  # as many tokens
    with capture_maps(model, CASE.selection) as maps:
        model(**turned)
        assert maps.value.shape[2:] == (COLUMNS, ROWS)
    with capture_maps(model, CASE.selection, grid=(ROWS, COLUMNS)) as maps:
        with pytest.raises(ValueError, match="grid must be that of the image in this pass, 10 x 6, got 6 x 10"):
            model(**turned)
        model(**inputs)
        assert maps.ready


def test_given_rows_are_for_one_size_of_image_and_text():
    case = CASES["any-joint"]
    model, inputs = case.make()
    with capture_maps(model, case.selection, **case.options) as maps:
        model(**inputs)
        value = maps.value
        wide = {**inputs, "hidden_states": torch.randn(BATCH, 4, 2 * ROWS, 4 * COLUMNS)}
        with pytest.raises(
            ValueError, match=r"hidden_states of shape \[4, 12, 20\] .*, and in this pass it has \[4, 12, 4"
        ):
            model(**wide)
        longer = {**inputs, "encoder_hidden_states": torch.randn(BATCH, TEXT + 1, 32)}
        with pytest.raises(ValueError, match=r"encoder_hidden_states of shape \[7, 32\] .*attach another capture"):
            model(**longer)
        model(**inputs)
        assert torch.equal(maps.value, value)


@pytest.mark.parametrize("family", ["sd3", "pixart", "sd", "flux", "qwen-image"])
def test_two_images_of_each_prompt_are_an_error_or_need_their_own_entries(family):
    case = CASES[family]
    model, inputs = case.make()

    def twice(value):
        if isinstance(value, dict):
            return {name: twice(item) for name, item in value.items()}
        if isinstance(value, list):
            return [item for item in value for _ in range(2)]
        batched = isinstance(value, torch.Tensor) and len(value) == BATCH
        return value.repeat_interleave(2, dim=0) if batched else value

    batch = twice(inputs)
    name = next(name for name in ("sample", "hidden_states") if name in batch)
    batch[name] = torch.randn_like(batch[name])
    with capture_maps(model, case.selection) as maps:
        with pytest.raises(ValueError, match="batch of"):
            model(**batch)
        assert not maps.ready


def test_a_captured_pass_of_half_the_batch_is_an_error(model_and_inputs):
    """As pipelines split a batch that does not fit the memory."""
    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection) as maps:
        for part in (slice(0, 1), slice(1, 2)):
            with pytest.raises(ValueError, match=r"batch of 2, the selection's.*got 1"):
                model(**{name: value[part] for name, value in inputs.items()})
        assert not maps.ready


def test_maps_that_are_read_are_not_changed_by_later_passes(model_and_inputs):
    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection) as maps:
        model(**inputs)
        value = maps.value
        kept = value.clone()
        model(**other(inputs))
        assert torch.equal(value, kept)
        assert not torch.equal(maps.value, kept)


def test_the_order_of_blocks_makes_no_difference(model_and_inputs):
    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection, blocks=[2, 0]) as maps:
        model(**inputs)
        value = maps.value
    expected = expected_maps(model, inputs, CASE, CASE.selection, [0, 2])
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def test_the_user_who_replaces_attention_with_a_function_of_his_own_keeps_it(model_and_inputs, monkeypatch):
    """The maps are those of the captured call; the replaced function serves the blocks that are not captured."""
    model, inputs = model_and_inputs
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def mine(*args, **kwargs):
        calls.append(threading.current_thread())
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", mine)
    with capture_maps(model, CASE.selection, blocks=[1]) as maps:
        model(**inputs)
    assert len(calls) == 2
    assert torch.nn.functional.scaled_dot_product_attention is mine
    expected = expected_maps(model, inputs, CASE, CASE.selection, [1])
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)


def test_a_first_pass_that_fails_does_not_decide_the_size_of_later_ones():
    case = CASES["flux"]
    model, inputs = case.make()
    wrong = {**inputs, "hidden_states": inputs["hidden_states"][:, :-1]}
    with torch.no_grad(), capture_maps(model, case.selection, rows=(TEXT, IMAGE), grid=(ROWS, COLUMNS)) as maps:
        with pytest.raises((RuntimeError, ValueError), match=r"size|rows"):
            model(**wrong)
        model(**inputs)
    torch.testing.assert_close(maps.value, expected_maps(model, inputs, case, case.selection), rtol=0, atol=1e-6)


def test_a_selection_made_in_inference_mode_has_a_backward_pass():
    for name in ("sd3", "flux"):
        case = CASES[name]
        model, inputs = case.make()
        with torch.inference_mode():
            selection = case.selection
        with capture_maps(model, selection, detach=False) as maps:
            model(**inputs)
            maps.value.sum().backward()


def test_a_grid_is_checked_on_a_gpu_where_that_reads_no_tensor():
    class OnGpu:
        is_cuda, shape = True, torch.Size([1, 4, 8, 8])

    given = GivenTokens({"grid": (4, 4)})
    image = cross_attention.unet_image(None, {"sample": OnGpu(), "encoder_hidden_states": torch.zeros(1, 7, 8)})
    tokens = given.in_place_of(image, {"sample": OnGpu()})
    with pytest.raises(ValueError, match="grid must be that of the image in this pass, 8 x 8, got 4 x 4"):
        tokens.grid_of(64)
