"""Plots of the benchmarks: one picture for each question, with every text inside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.text import Text

from benchmarks.reporting import plot

RESULTS = sorted((Path(plot.__file__).parents[1] / "results").glob("overhead-*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda p: p.stem)
def test_every_text_of_a_plot_is_inside_and_ours_are_in_our_colour(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    written = plot.draw(tmp_path / "run.png", json.loads(file.read_text()))
    assert [path for path in written if path.exists()] == written
    assert len(figures) == len(written) >= 3
    for figure in figures:
        figure.draw_without_rendering()
        width, height = figure.canvas.get_width_height()
        for text in figure.findobj(Text):
            box = text.get_window_extent()
            if text.get_text() and text.get_visible():
                assert 0 <= box.x0 < box.x1 <= width, text.get_text()
                assert 0 <= box.y0 < box.y1 <= height, text.get_text()
        for axis in figure.axes:
            for bar, label in zip(axis.patches, axis.get_yticklabels(), strict=True):
                ours = (
                    any(word in label.get_text() for word in ("ours", "capture", "STAR"))
                    and "plain" not in label.get_text()
                )
                assert (to_hex(bar.get_facecolor()).upper() == plot.OURS) == ours, label.get_text()
