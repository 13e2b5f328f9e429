"""The two tiers of tests: ``make test`` skips tests that are marked exhaustive, ``make test-all`` runs all tests."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest


def mostly_exhaustive(parameters: Iterable[Any], quick: Container[Any] | Callable[..., bool]) -> list[Any]:
    """Returns parameters for ``pytest.mark.parametrize``, of which those that are not quick are marked exhaustive.

    Args:
        parameters: a value or a tuple of values for each test.
        quick: the quick parameters, or a function of the values of a test that returns whether they are quick.
    """

    def marked(parameter: Any) -> Any:
        values = parameter if isinstance(parameter, tuple) else (parameter,)
        chosen = quick(*values) if callable(quick) else parameter in quick
        return parameter if chosen else pytest.param(*values, marks=pytest.mark.exhaustive)

    return [marked(parameter) for parameter in parameters]
