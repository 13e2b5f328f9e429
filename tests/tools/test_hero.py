"""README's first picture."""

from __future__ import annotations

import json

import torch
from PIL import Image

from star_kernels.maps import Drawing
from tools import hero


def test_the_bars_are_those_of_the_committed_measurement() -> None:
    values, title = hero.measured()
    cases = json.loads(hero.MEASURED.read_text())["parts"]["attention"]
    (case,) = (c for c in cases if (c["name"], c["batch"]) == ("SD3.5-M 1024²", 2))
    assert values["sdpa"] == 1
    assert values["ours"] == case["relative"]["ours"]["median"]
    assert title.endswith("NVIDIA H200, bfloat16")


def test_the_picture_has_every_label_inside() -> None:
    image = Image.new("RGB", (32, 32), "white")
    drawing = Drawing(image, torch.rand(2, 2, 8, 8), ("blue circle", "red triangle"), [1.0, 0.5])
    figure = hero.hero(drawing, "a blue circle and a red triangle")
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    texts = [text for sub in figure.subfigs for axis in sub.axes for text in (*axis.texts, axis.title)]
    assert {text.get_text() for text in texts} >= set(hero.BARS.values())
    for text in texts:
        box = text.get_window_extent()
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= width
        assert box.y1 <= height
