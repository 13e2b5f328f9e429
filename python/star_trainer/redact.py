"""Removes secrets from the output of a run.

Hidden are: users, passwords and query strings of URLs; the values of options with names such as "api_key"; and all
occurrences of secrets passed to :func:`remember`.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
import warnings
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"
_SCHEME = r"(?i:\b[a-z][a-z0-9+.-]{0,30}://)"
_ADDRESS = re.compile(rf"""({_SCHEME})([^\s'"<>]*)""")
# A user with a password, up to the last @ (a password may contain a slash); or a user without a password.
_USER = re.compile(r"[^/@:]*:(?!\d+(?:/|$)).*@|[^/@:]*@")
_PORT = re.compile(r"^([^/:[]*):(?!\d*(?:/|$))[^/]*")  # a port that is not a number

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = """
    secret secrets password passwords passwd pwd pw passphrase passcode credential credentials cred creds auth
    authorization bearer cookie cookies jwt apikey apikeys accesskey secretkey authtoken accesstoken headers
"""
_SECRETS = frozenset(_SECRET_WORDS.split())
_BEFORE_KEY = """
    api access secret private auth account service signing encryption subscription license ssh openai anthropic gemini
    google azure aws hf wandb
"""
_KEYS = frozenset(_BEFORE_KEY.split())
# Words before "token" in names that are not secrets: special tokens of tokenizers, and counts.
_BEFORE_TOKEN = "pad eos bos unk sep cls mask stop start end image text special max min num new per first last"
_NO_SECRET = frozenset(_BEFORE_TOKEN.split())
_VALUES = frozenset(("value", "string", "str", "header"))  # words that may follow the name of a secret: "auth_header"
# A name and its value in a text: api_key="...", 'token': b'...', Authorization: Bearer ...
_VALUE = r"""(?P<value>"[^"]*"?|'[^']*'?|[^\s,;"'{}()\[\]]+)"""
_NAMED = re.compile(
    r"""(?<![\w.-])(?P<name>[\w.-]+)(?P<between>\\*["']?\s*[:=]\s*\\*(?:(?i:Bearer|Basic|Token)\s+)?"""
    rf"""(?:[bBfFrRuU]{{1,2}}(?=["']))?){_VALUE}"""
)
_OPTION = re.compile(rf"(?<![\w.-])(?P<name>--[\w.-]+)(?P<between>\s+)(?!-){_VALUE}")  # --api_key ...
_BEARER = re.compile(r"(\b(?i:Bearer)\s+)(?=[^\s\d]*\d)[\w.~+/=-]{6,}")
_QUERY = re.compile(
    r"((?<!\S)/[^\s?'\"<>]*\?)[^\s'\"<>]*[^\s'\"<>,;:)]"
)  # the query of a URL that is shown without its host
_NOTHING = frozenset(("None", "null", "True", "False", "true", "false"))
_SHORTEST = 6  # minimum length of a secret that is searched for in texts
_known: set[str] = set()


def remember(secret: object) -> None:
    """Makes :func:`redact` hide this secret in every text, plain or escaped, if it has at least six characters."""
    text = str(secret).strip() if isinstance(secret, str | int | float) else ""
    if len(text) >= _SHORTEST:
        escaped = (repr(text)[1:-1], repr(text.encode("utf-8", "replace"))[2:-1], json.dumps(text)[1:-1])
        parts = text.encode("utf-8", "replace")
        _known.update({text, *escaped, quote(parts), quote(parts, safe=""), quote_plus(parts)})


def remember_options(options: object, *, secret: bool = False) -> None:
    """Remembers the values of options whose names denote secrets, at any depth."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            remember_options(value, secret=secret or is_secret(name))
    elif isinstance(options, list | tuple):
        for value in options:
            remember_options(value, secret=secret)
    elif secret:
        remember(options)


def is_secret(name: object) -> bool:
    """Whether the name of an option denotes a secret: "api_key" and "authToken" do, "max_tokens" does not."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        return False
    words = [word.lower() for word in _WORD.findall(name)]
    while len(words) > 1 and (words[-1] in _VALUES or words[-1].isdecimal()):
        words.pop()
    last, before = words[-1] if words else "", words[-2] if len(words) > 1 else ""
    if last in ("token", "key", "tokens", "keys"):
        return before in _KEYS or (last == "token" and before not in _NO_SECRET)
    return last in _SECRETS


def redact(text: str) -> str:
    """The text with secrets replaced by ``***``."""
    text = _QUERY.sub(rf"\1{HIDDEN}", _ADDRESS.sub(_shown, text))
    text = _BEARER.sub(rf"\1{HIDDEN}", _OPTION.sub(_without_value, _without_named(text)))
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def redacted(settings: Any) -> Any:
    """Settings (nested dictionaries and lists) with the secrets in URLs and options replaced by ``***``.

    Keys that become equal are numbered: "#2" is appended to the second.
    """
    if isinstance(settings, Mapping):
        shown: dict[Any, Any] = {}
        for key, value in settings.items():
            shown[_free(redacted(key), shown)] = _hidden(value) if is_secret(key) else redacted(value)
        return shown
    if isinstance(settings, list | tuple):
        return [redacted(value) for value in settings]
    if isinstance(settings, str):
        return _whole(settings)
    return settings


def redacted_traceback(error: BaseException) -> str:
    """The traceback of an exception and its causes, without secrets."""
    return redact("".join(traceback.format_exception(error)))


class RedactingFormatter(logging.Formatter):
    """A log formatter that removes secrets from messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def redact_warnings() -> None:
    """Removes secrets from the warnings that Python prints, for all libraries."""
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *arguments, **options: redact(plain(*arguments, **options))


def _hidden(value: Any) -> Any:
    """Hides all values except None and bools, but keeps the structure and the keys, such as names of headers."""
    if isinstance(value, Mapping):
        return {key: _hidden(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(part) for part in value]
    return value if value is None or isinstance(value, bool) else HIDDEN


def _without_named(text: str) -> str:
    """Also searches the values of names that are not secrets: "ValueError: token=..." contains two names."""
    shown, at = list[str](), 0
    while found := _NAMED.search(text, at):
        hidden = _without_value(found)
        if hidden == found[0]:
            end = found.start("value")
            shown.append(text[at:end])
        else:
            end = found.end()
            shown += [text[at : found.start()], hidden]
        at = end
    return "".join([*shown, text[at:]])


def _without_value(found: re.Match[str]) -> str:
    value = found["value"]
    if value in _NOTHING or found["name"] == "headers" or not is_secret(found["name"]):
        return found[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{found['name']}{found['between']}{quote}{HIDDEN}{quote}"


def _shown(found: re.Match[str]) -> str:
    """A URL within a text, without its secrets."""
    return found[1] + _without_secrets(found[2])


def _whole(setting: str) -> str:
    """A setting without its secrets. If it is a URL it may contain spaces and quotes: the URL is all of the text."""
    found = re.match(_SCHEME, setting)
    return found[0] + _without_secrets(setting[found.end() :]) if found else _ADDRESS.sub(_shown, setting)


def _without_secrets(address: str) -> str:
    """A URL, given without its scheme, without its secrets."""
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
