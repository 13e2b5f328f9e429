"""The generated blocks of README and docs agree with the JSON files of the results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import evidence


@pytest.mark.parametrize("page", list(evidence.pages()), ids=lambda page: page.name)
def test_the_blocks_of_a_page_agree_with_the_results(page: Path) -> None:
    text = page.read_text()
    assert evidence.render(text) == text, f"{page.name} is out of date; update it with python -m tools.evidence"


def test_a_changed_figure_is_restored() -> None:
    text = evidence.ROOT.joinpath("docs/benchmarks.md").read_text()
    block = evidence.attention()
    assert block in text
    altered = text.replace(block, block.replace("1.00", "0.99", 1))
    assert evidence.render(altered) == text


def test_the_pages_use_every_block_and_no_unknown_one() -> None:
    used = {name for page in evidence.pages() for _, name, *_ in evidence._BLOCK.findall(page.read_text())}
    assert used == set(evidence.BLOCKS)
