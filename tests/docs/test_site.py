"""Links have targets, and the site builds without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import NOTEBOOKS, PAGES, ROOT, anchors, links, name


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name)
def test_every_link_has_a_file_and_every_anchor_has_a_heading(page: Path) -> None:
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.exhaustive
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "index.html").read_text()
    assert "<h1" in index
    assert "at the price of attention" in index  # of README
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "the advantage allocated over latent positions" in reference  # of a docstring
    assert ":func:" not in reference


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")

    def leaves(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [leaf for inner in (part.values() if isinstance(part, dict) else part) for leaf in leaves(inner)]

    named = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert {page.name for page in PAGES if page.parent.name == "docs"} <= set(named)
