"""The list of equivalent mutants agrees with the code. `make mutation` runs the mutants."""

from __future__ import annotations

import mutation
import pytest


def test_every_equivalent_mutant_is_a_mutant_of_the_code() -> None:
    assert mutation.stale() == []


def test_an_entry_for_a_line_that_has_changed_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("star_kernels/allocation.py", "a line that is not there", "> -> >=")
    monkeypatch.setattr(mutation, "EQUIVALENT", {key: "no reason"})
    assert mutation.stale() == [key]


def test_equal_changes_of_equal_lines_have_different_keys() -> None:
    found = mutation.named("allocation", "a = b * c * d\na = b * c * d\n")
    assert [key[2] for key in found] == ["* -> /", "* -> / #2", "* -> / #3", "* -> / #4"]
    assert len({mutant.mutated for mutant in found.values()}) == 4
