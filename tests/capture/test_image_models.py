"""Every family of image models, in the ways in which its pipelines call the model.

The maps equal a materialised softmax over the queries and keys of the model's own attention calls, at the positions
that this file computes from the lengths of the texts; the outputs are those of the model without a capture.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from image_cases import IMAGE_CASES, ImageCase
from reference_maps import attention_calls, map_of
from tiny_image_models import GLYPHS, LONG, SHORT, hidream_inputs
from tiny_models import BATCH, COLUMNS, IMAGE, ROWS
from torch import Tensor

from star_kernels import TokenSelection
from star_kernels.capture import capture_maps

NAMES = list(IMAGE_CASES)
GUIDED = [name for name in NAMES if IMAGE_CASES[name].cfg]


def expected(model, inputs, case: ImageCase, lengths, selection: TokenSelection) -> Tensor:
    """``[batch, G, h, w]``: the mean over the captured calls of the rows of each sample."""
    calls = [call for call in attention_calls(model, inputs) if call[1].shape[2] == case.keys(lengths)]
    assert len(calls) >= 2
    whole = torch.stack([map_of(call, selection.shift(case.text)) for call in calls]).mean(dim=0)  # [batch, G, queries]
    own = [maps[:, first : first + IMAGE] for maps, first in zip(whole, case.image(lengths), strict=True)]
    return torch.stack(own).unflatten(-1, (ROWS, COLUMNS))


def outputs(model, inputs) -> Tensor:
    sample = model(**inputs).sample
    return torch.stack(tuple(sample)) if isinstance(sample, list) else sample


def check(name: str, lengths, selection: TokenSelection, **options):
    """The maps of a pass are the expected ones, and its outputs those without a capture."""
    case = IMAGE_CASES[name]
    model = case.model()
    torch.manual_seed(1)
    inputs = case.inputs(lengths)
    before = outputs(model, inputs)
    with capture_maps(model, selection, **options) as maps:
        after = outputs(model, inputs)
    found = maps.value
    reference = expected(model, inputs, case, lengths, selection)
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-6)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert reference[:, 0].flatten(1).std(dim=1).min() > 1e-4  # the maps are not flat
    assert not found[-1, 1].any()  # an empty phrase


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_two_prompts_of_different_length(name):
    case = IMAGE_CASES[name]
    check(name, case.lengths, case.selection())


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_two_images_of_each_of_two_prompts(name):
    case = IMAGE_CASES[name]
    check(name, [length for length in case.lengths for _ in range(2)], case.selection(images=2))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_guidance(name):
    """A doubled batch, in the order of the family's pipelines, or separate passes, of which one is disabled."""
    case = IMAGE_CASES[name]
    model, selection = case.model(), case.selection()
    torch.manual_seed(1)
    if case.cfg is None:
        inputs, unconditional = case.inputs(case.lengths), case.inputs((SHORT, SHORT))
        with capture_maps(model, selection) as maps:
            model(**inputs)
            maps.enabled = False
            model(**unconditional)
        reference = expected(model, inputs, case, case.lengths, selection)
    else:
        lengths = (SHORT, SHORT, *case.lengths) if case.cfg == "last" else (*case.lengths, SHORT, SHORT)
        inputs = case.inputs(lengths)
        for half in range(2):  # both halves have the same latents
            for b in range(BATCH):
                inputs[case.latent][half * BATCH + b] = inputs[case.latent][b]
        with capture_maps(model, selection) as maps:
            model(**inputs)
        before, after = (BATCH, 0) if case.cfg == "last" else (0, BATCH)
        part = slice(BATCH, None) if case.cfg == "last" else slice(BATCH)
        reference = expected(model, inputs, case, lengths, selection.among_empty(before, after))[part]
        wrong = "first" if case.cfg == "last" else "last"
        with capture_maps(model, selection, cfg=wrong) as other:
            model(**inputs)
        assert (other.value - reference).abs().max() > 1e-4
    torch.testing.assert_close(maps.value, reference, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", GUIDED)
def test_two_images_of_each_prompt_are_not_taken_for_guidance(name):
    case = IMAGE_CASES[name]
    inputs = case.inputs([length for length in case.lengths for _ in range(2)])
    model = case.model()
    with (
        pytest.raises(ValueError, match="the latents of its halves differ"),
        capture_maps(model, case.selection()),
    ):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_positions_that_are_not_text_are_an_error(name):
    """Also those between the text and the image, and, in Lumina 2, those of the image of a sample with a short text."""
    case = IMAGE_CASES[name]
    model, inputs = case.model(), case.inputs(case.lengths)
    longest = max(case.lengths)
    length = {"Z-Image": 64, "HunyuanImage 2.1": longest + GLYPHS, "HiDream-I1": 3 * longest}.get(name, longest)
    with (
        pytest.raises(ValueError, match=r"selection\.index must be positions of the text"),
        capture_maps(model, TokenSelection.from_positions([[length], [0]])),
    ):
        model(**inputs)
    with capture_maps(model, TokenSelection.from_positions([[length - 1], [0]])):
        model(**inputs)


@torch.no_grad()
def test_rows_by_sample_refuse_what_would_be_another_samples_map():
    case = IMAGE_CASES["Lumina 2"]
    model, inputs = case.model(), case.inputs(case.lengths)
    late = TokenSelection.from_positions([[0], [SHORT]])  # text of the first prompt, image of the second
    with (
        pytest.raises(ValueError, match=f"positions of text, below {SHORT} for sample 1 in this pass, got {SHORT}"),
        capture_maps(model, late),
    ):
        model(**inputs)
    options = {"rows": (LONG, IMAGE), "grid": (ROWS, COLUMNS)}
    with (
        pytest.raises(ValueError, match="rows must be None: in this pass the image rows differ between samples"),
        capture_maps(model, case.selection(), **options),
    ):
        model(**inputs)
    same = case.inputs((LONG, LONG))
    with capture_maps(model, case.selection(), **options) as chosen:
        model(**same)
    reference = expected(model, same, case, (LONG, LONG), case.selection())
    torch.testing.assert_close(chosen.value, reference, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_text_of_hidream_follows_a_square_image_directly():
    case = IMAGE_CASES["HiDream-I1"]
    model, inputs = case.model(), hidream_inputs((LONG, LONG))
    inputs["hidden_states"] = torch.randn(BATCH, 4, 12, 12)
    with capture_maps(model, case.selection()) as maps:
        model(**inputs)
    calls = [call for call in attention_calls(model, inputs) if call[1].shape[2] == 36 + 3 * LONG]
    reference = torch.stack([map_of(call, case.selection().shift(36), (0, 36)) for call in calls]).mean(dim=0)
    torch.testing.assert_close(maps.value, reference.unflatten(-1, (6, 6)), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("Z-Image", {"x": [torch.zeros(4, 1, 12, 20), torch.zeros(4, 1, 12, 16)]}, "x must be latents of one size"),
        ("Z-Image", {"x": [torch.zeros(4, 2, 12, 20)] * 2}, "x must be latents of images, with one frame each, got 2"),
        ("Z-Image", {"x": [[torch.zeros(4, 1, 12, 20)]] * 2}, r"several images for each sample \(omni\) are not"),
        ("HunyuanImage 2.1", {"hidden_states": torch.zeros(2, 4, 1, 12, 20)}, r"must be \[B, C, height, width\]"),
        ("HiDream-I1", {"hidden_states": torch.zeros(2, 60, 16)}, r"must be \[B, C, height, width\] while maps"),
    ],
)
def test_passes_without_one_grid_are_an_error(name, changed, message):
    case = IMAGE_CASES[name]
    model, inputs = case.model(), {**case.inputs(case.lengths), **changed}
    with pytest.raises(ValueError, match=message), capture_maps(model, case.selection()):
        model(**inputs)
