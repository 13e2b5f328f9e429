"""Links have targets, the site builds without a warning, and its code and tables fit into the column."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from built import CODE_CHARACTERS, COLUMN, TEXT_CHARACTERS, Html
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Html]:
    """The pages of the built site by their path."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = [path for path in folder.rglob("*.html") if path.name != "404.html"]
    return {str(path.relative_to(folder)): Html(path) for path in pages}


@pytest.mark.exhaustive
def test_the_site_has_readme_the_reference_notebooks_and_formulas(site: dict[str, Html]) -> None:
    assert "at the price of attention" in site["index.html"].text
    policy = site["reference/policy/index.html"].text
    assert "the advantage allocated over latent positions" in policy  # of a docstring
    assert ":func:" not in policy
    assert 'src="data:image/png' in site["notebooks/see-where-your-prompt-lives/index.html"].text
    method = site["method/index.html"].text
    assert "<math" in method
    assert "$$" not in method
    for page in site.values():
        assert "Apache License 2.0" in page.text
        assert "star-kernels 0" in page.text
        assert 'rel="icon"' in page.text


@pytest.mark.exhaustive
def test_every_link_of_the_site_has_a_target(site: dict[str, Html]) -> None:
    broken = []
    for page in site.values():
        for link in page.links:
            path, _, anchor = unquote(link).partition("#")
            target = (page.path.parent / path).resolve() if path else page.path
            target = target / "index.html" if target.is_dir() else target
            known = {str(html.path): html for html in site.values()}.get(str(target))
            if not target.is_file() or (anchor and known and anchor not in known.ids):
                broken.append(f"{page.path.parent.name}: {link}")
    assert not broken


@pytest.mark.exhaustive
def test_code_and_tables_fit_into_the_column_of_a_window_of_1400_pixels(site: dict[str, Html]) -> None:
    wide = []
    for path, page in site.items():
        for language, line in page.code:
            if language != "diff" and len(line) > (TEXT_CHARACTERS if language == "text" else CODE_CHARACTERS):
                wide.append(f"{path}: {line}")
        wide += [f"{path}: {heads}" for heads, width in page.tables if width > COLUMN]
    assert not wide


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")

    def leaves(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [leaf for inner in (part.values() if isinstance(part, dict) else part) for leaf in leaves(inner)]

    named = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert {str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents} <= set(named)
