"""Figures of maps and weights: patterns are drawn at their place, on the documented scales."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from star_kernels import captions, figures

IMAGE = np.full((64, 96, 3), (200, 20, 20), dtype=np.uint8)  # red
PAPER = 255 * figures.PAPER
SPOT = torch.zeros(8, 12)
SPOT[1:3, 8:11] = 1.0  # above and right of the middle


def drawn(figure: Figure, axis: int = 0) -> np.ndarray:
    """The content of a panel of a figure as RGB, cropped from the rendered file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    pixels = np.asarray(Image.open(buffer).convert("RGB")).astype(float)
    box = figure.axes[axis].get_window_extent()
    scale = 100 / figure.dpi
    height = pixels.shape[0]
    left, right = round(box.x0 * scale) + 3, round(box.x1 * scale) - 3
    top, bottom = height - round(box.y1 * scale) + 3, height - round(box.y0 * scale) - 3
    return pixels[top:bottom, left:right]


def opaque(pixels: np.ndarray) -> np.ndarray:
    """Pixels with at least half of the image's colour."""
    return pixels[..., 0] - pixels[..., 2] > 90


def centre(mask: np.ndarray) -> tuple[float, float]:
    """Row and column of the centre of the mask, as fractions of its size."""
    rows, columns = np.nonzero(mask)
    return float(rows.mean() / mask.shape[0]), float(columns.mean() / mask.shape[1])


def test_a_pattern_is_drawn_at_its_place() -> None:
    figure = figures.overlay(IMAGE, SPOT, title="spot")
    assert np.abs(drawn(figure, 0) - IMAGE[0, 0]).max() <= 2  # the image itself
    pixels = drawn(figure, 1)
    visible = opaque(pixels)
    assert centre(visible) == pytest.approx((2 / 8, 9.5 / 12), abs=0.03)
    assert visible.mean() == pytest.approx(6 / 96, abs=0.02)
    faint = figures.FAINT * IMAGE[0, 0] + (1 - figures.FAINT) * PAPER
    assert np.median(np.abs(pixels[~visible] - faint)) < 3


def test_a_map_is_interpolated_to_the_size_of_the_image() -> None:
    step = torch.tensor([[0.0, 1.0]])
    across = drawn(figures.overlay(np.zeros((64, 64, 3), dtype=np.uint8), step), 1).mean(axis=(0, 2))
    assert (np.diff(across) <= 0.5).all()  # darker from left to right
    assert len(np.unique(across.round())) > 20


@pytest.mark.parametrize("kind", ["pil", "array", "float tensor", "byte tensor", "bfloat16 tensor"])
def test_images_of_every_type_are_converted_alike(kind: str) -> None:
    pattern = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pattern).permute(2, 0, 1)
    image = {
        "pil": Image.fromarray(pattern),
        "array": pattern,
        "float tensor": tensor / 255,
        "byte tensor": tensor,
        "bfloat16 tensor": (tensor / 255).bfloat16(),
    }[kind]
    tolerance = 1 if kind == "bfloat16 tensor" else 0
    assert np.abs(figures.to_rgb(image).astype(int) - pattern).max() <= tolerance


def test_a_boolean_image_is_black_and_white() -> None:
    assert set(figures.to_rgb(torch.eye(4, dtype=torch.bool).expand(3, 4, 4)).flatten().tolist()) == {0, 255}


def test_the_panels_of_a_strip_share_one_scale() -> None:
    maps = torch.stack([0.1 * SPOT, SPOT])
    figure = figures.strip(maps, images=IMAGE, labels=["early", "late"], title="a strip")
    faint, strong = (opaque(drawn(figure, i)).sum() for i in range(2))
    assert strong > 20
    assert faint == 0
    assert [axis.get_title() for axis in figure.axes[:2]] == ["early", "late"]


def test_each_phrase_has_a_row_of_a_strip() -> None:
    maps = torch.zeros(3, 2, 8, 12)
    maps[0, 0], maps[2, 1] = SPOT, SPOT
    figure = figures.strip(maps, images=IMAGE, names=["red bench", "green dog"])
    assert [bool(opaque(drawn(figure, i)).sum() > 20) for i in range(6)] == [True, False, False, False, False, True]
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["red bench", "green dog"]
    assert [axis.get_title() for axis in figure.axes[:6]] == ["step 0", "step 1", "step 2", "", "", ""]


def test_a_strip_of_phrases_draws_evenly_spaced_steps() -> None:
    figure = figures.strip(SPOT.expand(7, 2, 8, 12), columns=3)
    assert [axis.get_title() for axis in figure.axes[:3]] == ["step 0", "step 3", "step 6"]


def test_each_phrase_has_its_own_scale_with_a_label() -> None:
    figure = figures.phrases(IMAGE, torch.stack([0.1 * SPOT, SPOT]), ["red bench", "green dog"])
    assert figure.axes[0].get_title() == "image"
    assert all(opaque(drawn(figure, i)).sum() > 20 for i in (1, 2))
    assert [axis.get_xlabel() for axis in figure.axes[1:3]] == ["up to 0.1", "up to 1"]


def test_the_colour_of_a_difference_is_its_sign() -> None:
    figure = figures.difference(SPOT, SPOT.roll((4, -6), dims=(0, 1)), names=("base", "tuned"))
    pixels = drawn(figure, 2)
    purple = (pixels[..., 2] > pixels[..., 1] + 30) & (pixels[..., 2] > pixels[..., 0] + 10)
    orange = (pixels[..., 0] > pixels[..., 2] + 80) & (pixels[..., 1] < 120)
    assert centre(purple) == pytest.approx((6 / 8, 3.5 / 12), abs=0.03)  # where the second run has more
    assert centre(orange) == pytest.approx((2 / 8, 9.5 / 12), abs=0.03)
    assert figure.axes[2].get_ylabel() == "tuned minus base"


def test_weights_show_the_mean_weight_of_each_step() -> None:
    values = torch.stack([torch.full((4, 4), 0.5), torch.full((4, 4), 1.5)])
    figure = figures.weights(values, image=IMAGE, labels=["first", "second"])
    heights = [bar.get_height() for axis in figure.axes for bar in axis.patches]
    assert heights == pytest.approx([0.5, 1.5])
    equal = figures.weights(torch.ones(2, 4, 4), image=IMAGE)
    assert not [bar for axis in equal.axes for bar in axis.patches]


def test_empty_and_non_finite_maps_are_drawn_transparent() -> None:
    non_finite = SPOT.clone()
    non_finite[0, 0] = torch.nan
    for values in (torch.zeros(4, 4), non_finite, torch.full((2, 2), torch.nan)):
        drawn(figures.overlay(IMAGE, values))
    assert opaque(drawn(figures.overlay(IMAGE, torch.zeros(4, 4)), 1)).sum() == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf minus inf, and means
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_non_finite_values_are_drawn(value: float, everywhere: bool) -> None:
    non_finite = torch.full_like(SPOT[None], value) if everywhere else SPOT[None].clone()
    non_finite[0, 0, 0] = value
    for figure in (
        figures.strip(non_finite),
        figures.phrases(IMAGE, non_finite, ["owl"]),
        figures.difference(SPOT[None], non_finite),
        figures.difference(non_finite, non_finite),
        figures.weights(non_finite),
    ):
        drawn(figure)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.overlay(IMAGE, torch.zeros(2, 3, 4)), r"values must have shape \[h, w\].*got \[2, 3, 4\]"),
        (lambda: figures.strip(torch.zeros(3, 4)), r"maps must have shape \[N, h, w\].*got \[3, 4\]"),
        (lambda: figures.strip(torch.zeros(2, 3, 4), labels=["a"]), "labels must be 2 strings.*got"),
        (lambda: figures.strip(torch.zeros(2, 3, 4), images=[IMAGE] * 3), "images must be one image or 2 .*got 3"),
        (lambda: figures.difference(torch.zeros(2, 3), torch.zeros(3, 3)), r"after must have the shape of before"),
        (lambda: figures.strip(torch.zeros(2, 3, 4), names=["a"]), r"names requires maps \[Steps, G, h, w\]"),
        (lambda: figures.strip(torch.zeros(2, 3, 4, 4), names=["a"]), "names must be 3 strings"),
        (lambda: figures.strip(torch.zeros(2, 3, 4), columns=0), "columns must be at least 1, got 0"),
        (lambda: figures.overlay(IMAGE, SPOT, top=-1.0), "top must be positive and finite, got -1"),
        (lambda: figures.overlay(IMAGE, SPOT, top=torch.nan), "top must be positive and finite, got nan"),
        (lambda: figures.overlay(torch.zeros(1, 4, 4), SPOT), r"image must be a tensor \[3, H, W\], got \[1, 4, 4\]"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unsupported_image_is_named() -> None:
    with pytest.raises(TypeError, match="image must be a PIL image"):
        figures.overlay(np.zeros((4, 4)), SPOT)


AWKWARD = [
    'a sign "$5" and "$6"',
    r"\$x_1^{2$ \frac{ $",
    r"100% of #1_a & {b} ~^\ ",
    "猫と犬の看板 \ud800 \U0001f9d1\u200d\U0001f680 ❤\ufe0f",
    "tab\tline\nbell\x07 escape\x1b[31m null\x00 \x85\u2028 end",
    "קטה \u200fאד\u05d5מה\u202e",
    "cafe\u0301",
    "very " * 500,
    "x" * 3000,
    "",
    "\u200b",
]


def figures_of(text: str) -> dict[str, Figure]:
    """Every kind of figure, with the text as every title, label and name."""
    maps = torch.stack([SPOT, 0.5 * SPOT])
    both = [text, text]
    return {
        "overlay": figures.overlay(IMAGE, SPOT, title=text),
        "strip": figures.strip(maps, labels=both, title=text),
        "phrases": figures.phrases(IMAGE, maps, both, title=text),
        "difference": figures.difference(maps, maps, names=(text, text), labels=both, title=text),
        "weights": figures.weights(maps, image=IMAGE, labels=both, title=text),
    }


def test_any_text_is_drawn_without_errors_or_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "_warned", True)
    figure = figures.strip(SPOT.expand(len(AWKWARD), 8, 12), labels=AWKWARD, title="".join(AWKWARD), columns=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), dpi=20)


@pytest.mark.parametrize("tex", [False, True])
def test_dollar_signs_are_drawn_literally(tex: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", tex)
    text = "$5_a$"
    for name, figure in figures_of(text).items():
        found = [artist for artist in figure.findobj(Text) if text in artist.get_text()]
        assert len(found) >= {"overlay": 1, "strip": 3, "phrases": 3, "difference": 6, "weights": 5}[name]
        assert not any(artist.get_parse_math() or artist.get_usetex() for artist in found)


def test_characters_without_a_glyph_are_squares_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "_warned", False)
    with pytest.warns(UserWarning, match=r"no font of figures has a glyph for U\+732B") as warned:
        first = figures.overlay(IMAGE, SPOT, title="猫 cat")
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.overlay(IMAGE, SPOT, title="犬 dog")
    assert first.axes[1].get_title() == "\u25a1 cat"


def test_long_titles_are_shortened_and_leave_room_for_the_panels() -> None:
    figure = figures.strip(torch.stack([SPOT, SPOT]), title="very " * 500)
    lines = figure.get_suptitle().splitlines()
    assert len(lines) == 4
    assert lines[-1].endswith("\u2026")
    assert max(map(len, lines)) <= 10 * figure.get_figwidth()
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().height > 0.3 * figure.bbox.height


def test_labels_that_are_not_strings_are_named() -> None:
    with pytest.raises(ValueError, match=r"labels must be 2 strings.*got \[1, 2\]"):
        figures.strip(torch.zeros(2, 3, 4), labels=[1, 2])


def test_frames_of_a_video_are_drawn_over_the_last_pixel_frame_that_they_cover() -> None:
    maps = torch.zeros(2, 3, 8, 12)
    maps[0, 2] = maps[1, 0] = SPOT
    video = [np.full((64, 96, 3), (200, 20, i), dtype=np.uint8) for i in range(9)]
    figure = figures.frames(maps, images=video, names=["red bench", "green dog"])
    assert [bool(opaque(drawn(figure, i)).sum() > 20) for i in (1, 2, 3)] == [False, True, True]
    assert [axis.get_title() for axis in figure.axes[:3]] == ["frame 0", "frame 1", "frame 2"]
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["red bench", "green dog"]
    over = figures.frames(torch.ones(3, 2, 2), images=video)
    blues = [np.asarray(axis.images[0].get_array())[..., 2].mean() * 255 for axis in over.axes[:3]]
    assert blues == pytest.approx([0, 4, 8], abs=0.01)
    few = figures.frames(torch.zeros(9, 2, 2), columns=3)
    assert [axis.get_title() for axis in few.axes[:3]] == ["frame 0", "frame 4", "frame 8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": torch.zeros(2, 2)}, r"maps must have shape \[N, h, w\]"),
        ({"maps": torch.zeros(3, 2, 2), "names": ["a"]}, r"names requires maps \[N, f, h, w\]"),
        (
            {"maps": torch.zeros(3, 2, 2), "images": [IMAGE] * 2},
            "images must be a list of at least the 3 .*got 2",
        ),
        ({"maps": torch.zeros(3, 2, 2), "images": IMAGE}, "images must be a list of at least the 3 frames.*ndarray"),
    ],
)
def test_bad_frames_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures.frames(**options)
