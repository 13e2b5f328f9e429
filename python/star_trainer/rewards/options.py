"""Checks of the options that rewards are made with."""

from __future__ import annotations

import math


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
) -> None:
    """Raises TypeError where an option is no number (of integers with ``whole``), ValueError where it is out of range."""
    kind = "an integer" if whole else "a finite number"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    limits = {"above": above, "at least": at_least, "at most": at_most}
    fits = math.isfinite(value) and not (above is not None and value <= above)
    fits = fits and not (at_least is not None and value < at_least) and not (at_most is not None and value > at_most)
    if not fits:
        bounds = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        raise ValueError(f"{name} must be {kind} {bounds}".rstrip() + f", got {value!r}")


def check_text(name: str, value: object) -> None:
    """Raises TypeError where an option is no string; what it is instead is not shown, for it may be a secret."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
