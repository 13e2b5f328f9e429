"""Sample grids show prompts verbatim."""

from __future__ import annotations

import io

import pytest
import torch
from matplotlib.text import Text

from star_trainer.record import grid


@pytest.mark.parametrize("prompt", ['a sign "$5" and "$6"', "very " * 200, "bell\x07 and\nline"])
def test_a_grid_shows_any_prompt(prompt: str) -> None:
    figure = grid([torch.rand(3, 8, 8)] * 2, [f"0.50: {prompt}"] * 2)
    figure.savefig(io.BytesIO(), dpi=20)
    titles = [text for text in figure.findobj(Text) if text.get_text().startswith("0.50: ")]
    assert len(titles) == 2
    assert not any(title.get_parse_math() for title in titles)
