"""Checks of rewards' options."""

from __future__ import annotations

import math
import os

import torch


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
) -> None:
    """Raises TypeError if an option is not a number (with ``whole``, an integer), ValueError if it is out of range."""
    kind = "an integer" if whole else "a finite number"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    limits = {"above": above, "at least": at_least, "at most": at_most}
    fits = math.isfinite(value) and not (above is not None and value <= above)
    fits = fits and not (at_least is not None and value < at_least) and not (at_most is not None and value > at_most)
    if not fits:
        bounds = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        raise ValueError(f"{name} must be {kind}{', ' if bounds else ''}{bounds}, got {value!r}")


def check_text(name: str, value: object) -> None:
    """Raises TypeError if an option is not a string. The message does not contain the value, which may be a secret."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError if an option is not a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def check_path(name: str, value: object) -> None:
    """Raises TypeError if an option is neither the name of a model nor a path."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise TypeError(f"{name} must be a name on the Hugging Face hub or a path, got {value!r}")


def device_of(value: object) -> torch.device:
    """The device that an option names.

    Raises:
        TypeError, ValueError: the value does not name a device.
    """
    if not isinstance(value, str | torch.device):
        raise TypeError(f"device must be a string or a torch.device, got {value!r}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"device must be a device of torch, such as cpu or cuda:0, got {value!r}") from error
