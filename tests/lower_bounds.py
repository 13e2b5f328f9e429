"""``lower_bounds.py [NAME==VERSION ...]``: the lower bound of every dependency in pyproject.toml, as pip's constraints.

Versions that are given replace the file's. ``make test-lower`` installs what this prints.
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
    """The version that each requirement of a pyproject.toml begins with, all extras included.

    Raises:
        ValueError: one without a lower bound, or with two.
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
