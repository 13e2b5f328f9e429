"""Hooks for mkdocs: pages outside docs/, formulas, and the version and repository of the site.

README is the first page, and notebooks are pages with their outputs. In the repository, a page links to a file such as
``../benchmarks/results/x.json``. In the site, that file is in the folder ``repository/``, and the hooks change the link
accordingly. Formulas, written as ``$...$``, become MathML, which browsers display without a script.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from tools import notebooks

ROOT = Path(__file__).resolve().parents[1]
# Pages outside docs/, and their names in the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{str(path.relative_to(ROOT)): f"notebooks/{path.stem}.md" for path in notebooks.PATHS},
}
OUTSIDE = "repository/"

FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Adds the version, the licence, and the repository if GitHub builds the site."""
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    licence = '<a href="https://www.apache.org/licenses/LICENSE-2.0">Apache License 2.0</a>'
    config.copyright = f"star-kernels {version[1]}, {licence}"
    if repository := os.environ.get("GITHUB_REPOSITORY"):
        config.repo_url = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{repository}"
        config.repo_name = repository
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside docs/, and the files that pages link to."""
    known = {file.src_uri for file in files}
    waiting = [*PAGES, *(source_of(file.src_uri) for file in files.documentation_pages())]
    while waiting:
        source = waiting.pop()
        if site_uri(source) not in known:
            files.append(_file(config, source))
            known.add(site_uri(source))
        if source.endswith((".md", ".ipynb")):
            found = [target for target in targets(text(source), source) if (ROOT / target).is_file()]
            waiting += [target for target in found if site_uri(target) not in known]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Changes links within the repository to links within the site."""
    source = source_of(page.file.src_uri)
    here = posixpath.dirname(site_uri(source)) or "."

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(site_uri(resolve(link[1], source)), here)

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


def on_page_content(content: str, **_: Any) -> str:
    """Converts formulas, and removes the names of roles in docstrings, such as ``:func:``."""
    content = FORMULA.sub(_mathml, content)
    return re.sub(r":(?:func|class|meth|mod|attr):(?=<code>)", "", content)


def text(source: str) -> str:
    """The Markdown text of a page, given its path in the repository."""
    path = ROOT / source
    return notebooks.markdown(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


def targets(markdown: str, source: str) -> list[str]:
    """The files that a page links to, as paths in the repository."""
    return [resolve(target, source) for part in FENCE.split(markdown)[::2] for target in LINK.findall(part)]


def resolve(target: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def site_uri(path: str) -> str:
    """The path in the site of a file of the repository."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path)


def source_of(uri: str) -> str:
    """The file of the repository for a page of the site."""
    written = {place: page for page, place in PAGES.items()}
    return written.get(uri) or (uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else f"docs/{uri}")


def _file(config: Any, source: str) -> File:
    if source.endswith(".ipynb"):
        return File.generated(config, site_uri(source), content=text(source))
    return File.generated(config, site_uri(source), abs_src_path=str(ROOT / source))


def _mathml(formula: re.Match[str]) -> str:
    return str(convert(html.unescape(formula[2]).strip(), display="block" if formula[1] == "div" else "inline"))
