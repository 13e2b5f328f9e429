"""The pages of the repository, and what stands in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/*.md"))]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text(page: Path) -> str:
    """Of a notebook, its Markdown cells."""
    written = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return written
    return "\n\n".join("".join(c["source"]) for c in json.loads(written)["cells"] if c["cell_type"] == "markdown")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks in a language, each below as many empty lines as make its lines' numbers those of the page."""
    written = text(page)
    return [
        "\n" * (written.count("\n", 0, found.start()) + 1) + found[2]
        for found in FENCE.finditer(written)
        if found[1] == language
    ]


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page, but addresses of the web."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text(page)))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Fragments that lead to headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text(page)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)
