"""A pass in which selected positions are not text is an error."""

import pytest
import torch

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import BATCH, CASES, COLUMNS, IMAGE, ROWS, TEXT

from star_kernels import TokenSelection
from star_kernels.capture import capture_maps
from star_kernels.prompts import TextRegion, select_tokens

FAMILIES = [name for name in CASES if name != "any-joint"]


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


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_beyond_the_text_are_an_error(family):
    case = CASES[family]
    stop = case.text + TEXT
    inside = [[case.text, stop - 1]] * BATCH
    message = rf"selection\.index must be positions of text, {case.text} to {stop - 1} in this pass, got"
    refused(case, TokenSelection.from_positions([[case.text], [stop]]), message)
    model, inputs = case.make()
    with torch.no_grad(), capture_maps(model, TokenSelection.from_positions(inside)) as maps:
        model(**inputs)
    assert maps.ready


def test_a_selection_for_fewer_image_tokens_is_an_error():
    """Its positions are image tokens in this pass."""
    refused(CASES["sd3"], TokenSelection.from_positions([[16], [17]]), "60 to 66 in this pass, got 16 to 17")


@pytest.mark.parametrize("image_tokens", [IMAGE - 2, IMAGE + 2])
def test_a_selection_made_for_another_image_size_is_an_error_even_if_its_positions_are_text(image_tokens):
    region = TextRegion("words", Words(), TEXT, after_image=True)
    selection, _ = select_tokens(["a b c d e"] * BATCH, [region], source=["c", "d"], image_tokens=image_tokens)
    assert selection.first >= IMAGE
    message = (
        rf"made for text that starts at position {image_tokens} .* 7 tokens of text start at position 60.*image_tokens"
    )
    refused(CASES["sd3"], selection, message)


@torch.no_grad()
def test_a_selection_made_for_this_image_size_is_accepted():
    region = TextRegion("words", Words(), TEXT, after_image=True)
    selection, _ = select_tokens(["a b c", "c b a"], [region], source=["c"], image_tokens=IMAGE)
    model, inputs = CASES["sd3"].make()
    with capture_maps(model, selection) as maps:
        model(**inputs)
    expected = expected_maps(model, inputs, CASES["sd3"], TokenSelection.from_positions([[2], [0]]).shift(IMAGE))
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)


def test_a_selection_of_text_padded_on_the_left_to_another_length_is_an_error():
    region = TextRegion("words", Words("left"), TEXT - 1)
    selection, _ = select_tokens(["a b c"] * BATCH, [region], source=["c"])
    assert selection.last < TEXT
    refused(CASES["flux2"], selection, "made for 6 tokens of text .* in this pass 7 tokens .*max_sequence_length")
    right, _ = select_tokens(["a b c"] * BATCH, [TextRegion("words", Words(), TEXT - 1)], source=["c"])
    assert right.text == (0, None)  # the positions do not depend on the length of the text


@torch.no_grad()
def test_an_empty_selection_is_accepted():
    model, inputs = CASES["sd3"].make()
    with capture_maps(model, TokenSelection.from_positions([[], []])) as maps:
        model(**inputs)
    assert maps.value.shape == (BATCH, 1, ROWS, COLUMNS)
    assert not maps.value.any()


@torch.no_grad()
def test_a_model_without_an_adapter_is_not_checked():
    """The position of its text is unknown: the keys may be the text only."""
    case = CASES["any-joint"]
    model, inputs = case.make()
    with capture_maps(model, TokenSelection.from_positions([[0], [1]]), **case.options) as maps:
        model(**inputs)
    assert maps.ready
