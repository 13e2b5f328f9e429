"""Every measured figure in README and docs is the one in benchmarks/results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import evidence


@pytest.mark.parametrize("page", list(evidence.pages()), ids=lambda page: page.name)
def test_pages_say_what_was_measured(page: Path) -> None:
    text = page.read_text()
    assert evidence.render(text) == text, f"{page.name} is out of date: python -m tools.evidence writes it"


def test_a_changed_figure_is_noticed() -> None:
    text = evidence.ROOT.joinpath("README.md").read_text()
    block = evidence.attention()
    assert block in text
    altered = text.replace(block, block.replace("1.00", "0.99", 1))
    assert evidence.render(altered) == text


def test_every_block_is_used_and_known() -> None:
    used = {name for page in evidence.pages() for _, name, *_ in evidence._BLOCK.findall(page.read_text())}
    assert used == set(evidence.BLOCKS)
