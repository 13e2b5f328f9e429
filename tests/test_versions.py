"""The versions in docs, pyproject.toml, constraints.txt and CI agree with each other."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib")
version = pytest.importorskip("packaging.version")
specifiers = pytest.importorskip("packaging.specifiers")
canonical = pytest.importorskip("packaging.utils").canonicalize_name
lower_bounds = pytest.importorskip("lower_bounds")

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = {canonical(line.split("==")[0]): line.split("==")[1] for line in LINES if not line.startswith("#")}
BOUNDS = lower_bounds.lower_bounds((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE = PROJECT["project"]["requires-python"].removeprefix(">=")  # the oldest Python
PINNED = "3.11"  # the oldest that the pinned versions take


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_oldest_python_is_the_same_everywhere() -> None:
    assert f"Python {PACKAGE} or newer" in read("docs/quickstart.md")
    assert f"Python {PINNED} or newer" in read("README.md")
    assert f"on Python {PINNED} or newer" in LINES[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{PACKAGE.replace('.', '')}"
    assert PROJECT["tool"]["cibuildwheel"]["build"].startswith(f"cp{PINNED.replace('.', '')}-")
    pages = [*ROOT.glob("docs/*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
    for page in pages:
        said = set(re.findall(r"Python (?:from )?(3\.\d+)", page.read_text(encoding="utf-8")))
        assert said <= {PACKAGE, PINNED}, page.name
    for workflow in ROOT.glob(".github/workflows/*.yml"):
        assert set(re.findall(r"python-version: \"([\d.]+)\"", workflow.read_text(encoding="utf-8"))) <= {PINNED}


def test_every_pinned_version_supports_the_first_release_of_that_python() -> None:
    """Checks the packages whose installed version is the pinned one."""
    installed = [d for d in metadata.distributions() if PINS.get(canonical(d.metadata["Name"])) == d.version]
    required = {d.metadata["Name"]: d.metadata.get("Requires-Python") or "" for d in installed}
    refused = {
        name: text for name, text in required.items() if not specifiers.SpecifierSet(text).contains(f"{PINNED}.0")
    }
    assert not refused


def test_every_pinned_version_is_in_the_declared_range() -> None:
    for name, bound in BOUNDS.items():
        assert version.Version(PINS[canonical(name)]) >= version.Version(bound), name


def test_every_dependency_has_one_lower_bound() -> None:
    assert {"torch", "diffusers", "transformers", "peft"} <= set(BOUNDS)
    text = '[project]\nname = "p"\ndependencies = ["a>=1.0"]\n[project.optional-dependencies]\nx = ["p[y]", "{}"]\n'
    assert lower_bounds.lower_bounds(text.format("b[c]>=2; python_version > '3'")) == {"a": "1.0", "b": "2"}
    for requirement, message in (("b", "'b' has no lower bound"), ("a>=1.1", "a has two lower bounds, 1.0 and 1.1")):
        with pytest.raises(ValueError, match=re.escape(message)):
            lower_bounds.lower_bounds(text.format(requirement))
