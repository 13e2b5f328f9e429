"""The pages of the repository: their text, code blocks, links and headings."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
OUTSIDE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES = [*OUTSIDE, *sorted(ROOT.glob("docs/**/*.md"))]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text(page: Path) -> str:
    """The Markdown text of a page or of the cells of a notebook."""
    content = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return content
    return "\n\n".join("".join(c["source"]) for c in json.loads(content)["cells"] if c["cell_type"] == "markdown")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks in a language, each after as many empty lines as preserve the line numbers of the page."""
    markdown = text(page)
    return [
        "\n" * (markdown.count("\n", 0, found.start()) + 1) + found[2]
        for found in FENCE.finditer(markdown)
        if found[1] == language
    ]


def links(page: Path) -> list[str]:
    """The targets of links and images of a page, except web addresses."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text(page)))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text(page)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)
