"""mkdocs: README is the first page, and what pages link to outside docs/ becomes part of the site.

Pages are written for the repository, where a link to ``../benchmarks/results/x.json`` leads to that file. In the site
the file lies below ``repository/``, and the link says so.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Pages that are written outside docs/, and their names in the site.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
OUTSIDE = "repository/"

FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and files that stand outside docs/."""
    known = {file.src_uri for file in files}
    waiting = [*PAGES, *(source_of(file.src_uri) for file in files.documentation_pages())]
    while waiting:
        source = waiting.pop()
        if site_uri(source) not in known:
            files.append(File.generated(config, site_uri(source), abs_src_path=str(ROOT / source)))
            known.add(site_uri(source))
        if source.endswith(".md"):
            found = [t for t in targets((ROOT / source).read_text(encoding="utf-8"), source) if (ROOT / t).is_file()]
            waiting += [target for target in found if site_uri(target) not in known]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository as links of the site."""
    source = source_of(page.file.src_uri)
    here = posixpath.dirname(site_uri(source)) or "."

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(site_uri(resolve(link[1], source)), here)

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings' roles (``:func:`` and the like) without their names."""
    return re.sub(r":(?:func|class|meth|mod|attr):(?=<code>)", "", html)


def targets(markdown: str, source: str) -> list[str]:
    """Files that a page of the repository links to, by their paths in it."""
    return [resolve(target, source) for part in FENCE.split(markdown)[::2] for target in LINK.findall(part)]


def resolve(target: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def site_uri(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path)


def source_of(uri: str) -> str:
    """The file of the repository that a page of the site is written in."""
    written = {place: page for page, place in PAGES.items()}
    return written.get(uri) or (uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else f"docs/{uri}")
