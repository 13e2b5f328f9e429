"""The hint of an error message about an unknown name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def suggestion(name: str, known: Sequence[str], before: str = "") -> str:
    """A hint with the known name that an unknown one abbreviates or is most similar to; may be empty."""
    section, _, short = name.rpartition(".")
    found = [other for other in known if other.rpartition(".")[0] == section and _initials(other) == short]
    found = found or get_close_matches(name, known, n=1)
    return f"; did you mean {before}{found[0]}?" if found else ""


def _initials(name: str) -> str:
    """The first letters of the words of a setting, ``lr`` for ``train.learning_rate``."""
    return "".join(word[:1] for word in name.rpartition(".")[2].split("_"))
