"""A pass in which selected positions are not text is an error."""

import pytest
import torch

pytest.importorskip("diffusers")

from reference_maps import attention_calls, expected_maps, map_of
from tiny_models import BATCH, CASES, COLUMNS, IMAGE, ROWS, TEXT

from star_kernels import TokenSelection
from star_kernels.capture import attach_maps, capture_maps
from star_kernels.prompts import TextRegion, select_tokens


class Words:
    """A fast tokenizer that has a token for each word."""

    is_fast = True

    def __init__(self, padding_side="right"):
        self.padding_side = padding_side

    def __call__(self, text, *, max_length, **options):
        starts = [0, *(i + 1 for i, c in enumerate(text) if c == " ")]
        return {"offset_mapping": [(s, (text + " ").index(" ", s)) for s in starts][:max_length]}


def refused(case, selection, message):
    model, inputs = case.make()
    with torch.no_grad(), capture_maps(model, selection) as maps, pytest.raises(ValueError, match=message):
        model(**inputs)
    assert not maps.ready


@pytest.mark.parametrize("family", CASES)
def test_positions_beyond_the_text_are_an_error(family):
    case = CASES[family]
    model, inputs = case.make()
    message = r"selection\.index must be positions of the text, 0 to 6 in this pass, got 0 to 7: 0 is the first token"
    beyond = TokenSelection.from_positions([[0], [TEXT]])
    with torch.no_grad(), capture_maps(model, beyond, **case.options) as maps, pytest.raises(ValueError, match=message):
        model(**inputs)
    assert not maps.ready
    inside = TokenSelection.from_positions([[0, TEXT - 1]] * BATCH)
    with torch.no_grad(), capture_maps(model, inside, **case.options) as maps:
        model(**inputs)
    assert maps.ready


@torch.no_grad()
@pytest.mark.parametrize("doubled", [False, True])
def test_one_selection_is_for_images_of_every_size(doubled, monkeypatch):
    """The text of SD3 starts at another key for each size; the positions of keys are computed once for each start."""
    model, inputs = CASES["sd3"].make()
    selection, _ = select_tokens(["a b c", "c b a"], [TextRegion("words", Words(), TEXT)], source=["c"])
    made, original = [], TokenSelection.shift
    monkeypatch.setattr(TokenSelection, "shift", lambda *given: made.append(given[1]) or original(*given))
    handle = attach_maps(model, selection)
    for rows in (ROWS, 4, ROWS, 4):
        own = {**inputs, "hidden_states": inputs["hidden_states"][:, :, : 2 * rows]}
        batch = {k: torch.cat([x if k == "hidden_states" else x + 1, x]) for k, x in own.items()} if doubled else own
        model(**batch)
        found = handle.take()
        image = rows * COLUMNS
        handle.enabled = False
        calls, handle.enabled = attention_calls(model, own), True
        keys = TokenSelection.from_positions([[image + 2], [image]])
        expected = torch.stack([map_of(call, keys, (0, image)) for call in calls]).mean(dim=0)
        torch.testing.assert_close(found, expected.unflatten(-1, (rows, COLUMNS)), rtol=0, atol=1e-5)
    handle.remove()
    assert made == [IMAGE, 4 * COLUMNS]


def test_a_selection_first_used_in_inference_mode_can_be_trained_with():
    model, inputs = CASES["sd3"].make()
    with capture_maps(model, CASES["sd3"].selection, detach=False) as maps:
        with torch.inference_mode():
            model(**inputs)
        model(**inputs)
        maps.value.sum().backward()


def test_a_selection_of_text_padded_on_the_left_to_another_length_is_an_error():
    region = TextRegion("words", Words("left"), TEXT - 1)
    selection, _ = select_tokens(["a b c"] * BATCH, [region], source=["c"])
    assert selection.last < TEXT
    refused(CASES["flux2"], selection, "padded on the left to 6 tokens, but this pass has 7 .*max_sequence_length")
    right, _ = select_tokens(["a b c"] * BATCH, [TextRegion("words", Words(), TEXT - 1)], source=["c"])
    assert right.text_length is None  # the positions do not depend on the length of the text


@torch.no_grad()
def test_an_empty_selection_is_accepted():
    model, inputs = CASES["sd3"].make()
    with capture_maps(model, TokenSelection.from_positions([[], []])) as maps:
        model(**inputs)
    assert maps.value.shape == (BATCH, 1, ROWS, COLUMNS)
    assert not maps.value.any()


@torch.no_grad()
def test_positions_are_those_of_keys_in_a_model_whose_text_is_not_known():
    case = CASES["any-joint"]
    model, inputs = case.make()
    expected = expected_maps(model, inputs, case, case.selection)
    options = {name: case.options[name] for name in ("rows", "grid")}
    with capture_maps(model, case.selection.shift(case.text), **options) as maps:
        model(**inputs)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)
    with capture_maps(model, case.selection, **options, text=(case.text, None)) as maps:
        model(**inputs)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", [3, (1,), (-1, 2), (1, 0), (None, 3), (1, 2.5), "ab"])
def test_a_bad_text_option_is_named(text):
    with pytest.raises(ValueError, match=r"text must be the \(start, length\) of the text among the keys"):
        attach_maps(CASES["sd3"].make()[0], text=text)
