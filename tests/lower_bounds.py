"""Prints the lower bounds of all dependencies in pyproject.toml as constraints for pip.

Versions on the command line (NAME==VERSION) replace those in the file. ``make test-lower`` installs these versions.
"""

from __future__ import annotations

import re
import sys
from itertools import chain
from pathlib import Path

import tomllib

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)")


def lower_bounds(text: str) -> dict[str, str]:
    """The lower bound of each requirement in the text of a pyproject.toml, including all extras.

    Raises:
        ValueError: if a requirement has no lower bound or two different ones.
    """
    project = tomllib.loads(text)["project"]
    found: dict[str, str] = {}
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        if requirement.startswith(f"{project['name']}["):
            continue
        match = _REQUIREMENT.match(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} has no lower bound")
        name, version = match.groups()
        if found.setdefault(name, version) != version:
            raise ValueError(f"{name} has two lower bounds, {found[name]} and {version}")
    return found


if __name__ == "__main__":
    given = dict(argument.split("==") for argument in sys.argv[1:])
    print("\n".join(f"{n}=={v}" for n, v in {**lower_bounds(PROJECT.read_text(encoding="utf-8")), **given}.items()))
