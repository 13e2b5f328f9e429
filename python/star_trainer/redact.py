"""Addresses as they may be shown: without user, password and query, which may hold a secret."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_SCHEME = r"(?i:\b[a-z][a-z0-9+.-]*://)"
_ADDRESS = re.compile(rf"""({_SCHEME})([^\s'"<>]*)""")
# A user with a password, up to the last @, for a password may hold a slash; or a user alone.
_USER = re.compile(r"[^/@:]*:(?!\d+(?:/|$)).*@|[^/@:]*@")
_PORT = re.compile(r"^([^/:[]*):(?!\d*(?:/|$))[^/]*")  # one that is no number


def redact(text: str) -> str:
    """A text with the user, password, query and fragment of every address in it replaced by ``***``."""
    return _ADDRESS.sub(lambda found: found[1] + _without_secrets(found[2]), text)


def redacted(settings: Any) -> Any:
    """Settings, of dictionaries, lists and values, with every text redacted, keys as well.

    Keys that are alike without what is hidden are numbered: the second has "#2" at its end.
    """
    if isinstance(settings, dict):
        shown: dict[Any, Any] = {}
        for key, value in settings.items():
            shown[_free(redacted(key), shown)] = redacted(value)
        return shown
    if isinstance(settings, list | tuple):
        return [redacted(value) for value in settings]
    if isinstance(settings, str):
        return _whole(settings)
    return settings


def _whole(setting: str) -> str:
    """An address that is a setting may hold blanks and quotes: all of it counts."""
    found = re.match(_SCHEME, setting)
    return found[0] + _without_secrets(setting[found.end() :]) if found else redact(setting)


def _without_secrets(address: str) -> str:
    """Of an address without its scheme."""
    place = re.split(r"[?#]", address, maxsplit=1)
    user = _USER.match(place[0])
    shown = f"{HIDDEN}@{place[0][user.end() :]}" if user else _PORT.sub(rf"\1:{HIDDEN}", place[0])
    return f"{shown}?{HIDDEN}" if len(place) > 1 else shown


def _free(key: Any, taken: dict[Any, Any]) -> Any:
    number, free = 1, key
    while free in taken:
        number += 1
        free = f"{key}#{number}"
    return free
