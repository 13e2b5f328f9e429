"""The two tiers of the tests: ``make test`` leaves out what is marked exhaustive, ``make test-all`` runs everything."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest


def mostly_exhaustive(parameters: Iterable[Any], quick: Container[Any] | Callable[..., bool]) -> list[Any]:
    """Values for ``pytest.mark.parametrize``: those that are not quick are exhaustive.

    Args:
        parameters: a value, or a tuple of values, for each test.
        quick: the quick ones of the parameters, or a function that tells, from the values of a test.
    """

    def marked(parameter: Any) -> Any:
        values = parameter if isinstance(parameter, tuple) else (parameter,)
        chosen = quick(*values) if callable(quick) else parameter in quick
        return parameter if chosen else pytest.param(*values, marks=pytest.mark.exhaustive)

    return [marked(parameter) for parameter in parameters]
