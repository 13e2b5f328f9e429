"""Applies the diffs of a guide to the files of a checkout, so that what is run is what the guide says.

A diff begins with ``---`` and the files that it is for. ``@@ `` marks a place: the search continues after it. Lines
with ``-`` are replaced by the lines with ``+`` after them, and lines with ``+`` after a line of context are inserted.
``...`` stands for text within a line, `` ... `` for any number of lines, and indentation is ignored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Edit(NamedTuple):
    """A place in a file, and the lines that replace or follow it."""

    pattern: str
    replaces: bool
    lines: list[str]
    comment: bool = False  # a place only


def diffs(page: Path) -> dict[str, list[Edit]]:
    """The edits of each file in a page's blocks of ``diff``."""
    found: dict[str, list[Edit]] = {}
    for block in re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL):
        for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
            files, _, body = part.partition("\n")
            for file in files.split():
                found[file] = _edits(body)
    return found


def _edits(body: str) -> list[Edit]:
    edits: list[Edit] = []
    for line in body.splitlines():
        if line.startswith("@@"):
            edits.append(Edit(line[2:].split("  #")[0].strip().split("(...)")[0], False, [], True))
        elif line.startswith("+"):
            edits[-1].lines.append(line[1:].strip())
        else:
            edits.append(Edit(line[1:].strip(), line.startswith("-"), []))
    return edits


def apply(text: str, edits: list[Edit], *, star: bool) -> str:
    """The text of a file with the edits applied; without those that are marked ``# *`` if ``star`` is False.

    Raises:
        LookupError: a place does not exist.
    """
    position = 0
    for edit in edits:
        match = re.compile(_regex(edit), re.MULTILINE).search(text, position)
        if match is None:
            raise LookupError(f"no line matches {edit.pattern!r}")
        lines = [line for line in edit.lines if star or not line.endswith("# *")]
        if edit.replaces and edit.lines and not lines:  # only lines for STAR: the original stays
            position = match.end()
            continue
        indent = match.group(1) if not edit.comment else ""
        added = "".join(f"{indent}{line}\n" for line in lines)
        kept = "" if edit.replaces else match.group(0)
        text = text[: match.start()] + kept + added + text[match.end() :]
        position = match.start() + len(kept) + len(added)
    return text


def _regex(edit: Edit) -> str:
    body = re.escape(edit.pattern).replace(r"\ \.\.\.\ ", r"[\s\S]*?").replace(r"\.\.\.", r"[^\n]*?")
    return rf"^([ \t]*){body}[^\n]*\n" if edit.comment or not edit.replaces else rf"^([ \t]*){body}[ \t]*(?:#[^\n]*)?\n"
