"""Rewards that an HTTP server computes.

The protocol: a request is a POST of JSON::

    {"images": ["<base64 of a PNG>", ...], "prompts": ["...", ...], "metadata": [{...}, ...]}

The response has status 200 and a score for each image, in order; null or NaN if an image could not be scored::

    {"scores": [0.25, null, ...]}

A request is retried after a status of 408, 425, 429, or 500 and above, a connection error, or a timeout. The wait that
``Retry-After`` requests is respected, up to the timeout. Other failures are not retried: other statuses, including
redirects, an invalid certificate, and a response in another format or longer than 16 MiB. With a token, the request has
the header ``Authorization: Bearer <token>``: use https unless the server is on the same machine.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import json
import math
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
from torch import Tensor

from star_trainer.redact import HIDDEN, redacted, remember
from star_trainer.rewards.base import Metadata, RewardError
from star_trainer.rewards.images import encode, slices, to_pil
from star_trainer.rewards.options import check_number, check_text

_SHOWN = 200  # maximum number of characters of a response in an error message
_SECRET = 8  # minimum length of a value in a URL's query that is treated as a secret
_AGAIN = (408, 425, 429)  # retried statuses, besides 500 and above
_LONGEST = 1 << 24  # maximum bytes of a response
_REFUSAL = 1 << 16  # maximum bytes that are read of a response with an error status


class RemoteReward:
    """Posts images to a server and returns its scores; the module's docstring describes the protocol.

    Args:
        url: an http or https URL without user and password. Messages do not contain its query, which may contain a
            token.
        timeout: maximum time for the connection, and for the response, in seconds.
        retries: number of retries after a failure that may be temporary.
        backoff: seconds before the first retry; doubled with each retry, up to the timeout.
        batch_size: number of images per request; None sends all.
        token_env: name of the environment variable that contains the token. The token must be printable ASCII; one
            newline at its end is removed. Messages do not contain the token.
        name: name of the reward; None uses host and path of the URL.

    Raises:
        TypeError: an option of another type.
        ValueError: an invalid URL or number, or a token that is not set or contains other characters.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 120.0,
        retries: int = 3,
        backoff: float = 1.0,
        batch_size: int | None = None,
        token_env: str | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(url, str) or not _is_address(url):
            shown = repr(redacted(url)) if isinstance(url, str) and "://" in url else "another value"
            raise ValueError(
                f"url must be http(s)://host/path in ASCII characters, without user and password, got {shown}"
            )
        check_number("timeout", timeout, above=0)
        check_number("retries", retries, at_least=0, whole=True)
        check_number("backoff", backoff, at_least=0)
        if batch_size is not None:
            check_number("batch_size", batch_size, at_least=1, whole=True)
        for option, text in (("token_env", token_env), ("name", name)):
            if text is not None:
                check_text(option, text)
        self.url = url
        self.name = public_address(url) if name is None else name
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.batch_size = batch_size
        self._token_env = token_env
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._sleep: Callable[[float], None] = time.sleep
        self._token()

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The server's scores.

        Raises:
            RewardError: the server cannot be reached, returns an error, or does not follow the protocol.
            ValueError: metadata that JSON cannot represent.
        """
        scores: list[float] = []
        for part in slices(len(images), self.batch_size or max(len(images), 1)):
            body = request_body(images[part], prompts[part], metadata[part], self.name)
            scores += read_scores(self._post(body), part.stop - part.start, self.name, self._hide)
        return torch.tensor(scores, dtype=torch.float32)

    def _post(self, body: bytes) -> bytes:
        attempt = 0
        while True:
            try:
                return self._send(body)
            except _Again as problem:
                if attempt == self.retries:
                    raise RewardError(
                        f"{self.name}: {problem}, in each of {attempt + 1} attempts"
                    ) from problem.__cause__
                wait = max(self.backoff * 2.0 ** min(attempt, 30), problem.wait)
            if wait:
                self._sleep(min(wait, self.timeout))
            attempt += 1

    def _send(self, body: bytes) -> bytes:
        token = self._token()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self.url, body, headers, method="POST")
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except urllib.error.URLError as error:  # while connecting or sending
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise RewardError(f"{self.name}: {error.reason}") from error
            raise _Again(f"no connection, {error.reason}") from error
        except TimeoutError as error:
            raise _Again(f"no response after {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            shown = self._hide(str(error))[:_SHOWN]
            raise _Again(f"connection lost, {type(error).__name__}: {shown}") from error

    def _read(self, response: Any) -> bytes:
        answer = bytearray()
        length = self._fill(answer, response, _LONGEST + 1)
        if len(answer) > _LONGEST:
            raise RewardError(f"{self.name}: the response must not be longer than {_LONGEST >> 20} MiB")
        if length is not None and len(answer) < length:
            raise http.client.IncompleteRead(bytes(answer), length - len(answer))
        return bytes(answer)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """The exception for a status other than 200."""
        answer = bytearray()
        with contextlib.suppress(OSError, http.client.HTTPException):  # the status suffices
            self._fill(answer, error.fp, _REFUSAL)
        message = f"status {error.code}, {self._hide(answer.decode('utf-8', 'replace'))[:_SHOWN]!r}"
        if error.code >= 500 or error.code in _AGAIN:
            return _Again(message, wait_of(error.headers.get("Retry-After")))
        return RewardError(f"{self.name}: {message}")

    def _fill(self, answer: bytearray, response: Any, most: int) -> int | None:
        """Appends at most ``most`` bytes of the body to ``answer``. Returns the content length, or None.

        Raises:
            TimeoutError: the body takes longer than the timeout; the timeout of the socket applies to each read.
        """
        length: int | None = response.length
        deadline = time.monotonic() + self.timeout
        left = most if length is None else min(most, length)
        while left and (part := response.read1(min(left, 1 << 16))):
            answer += part
            left -= len(part)
            if left and time.monotonic() > deadline:
                raise TimeoutError
        return length

    def _token(self) -> str:
        """The current token, without the newline at the end of mounted secrets."""
        if self._token_env is None:
            return ""
        token = os.environ.get(self._token_env, "").removesuffix("\n").removesuffix("\r")
        # A value that is not a variable's name may be the token itself.
        shown = repr(self._token_env) if re.fullmatch("[A-Z_][A-Z0-9_]*", self._token_env) else "(not shown)"
        if not token:
            raise ValueError(f"token_env names the environment variable {shown}, which is not set")
        remember(token)
        if not (token.isascii() and token.isprintable()):
            raise ValueError(
                f"token_env names the environment variable {shown}, whose value must be printable ASCII "
                "characters, with at most one newline at the end"
            )
        return token

    def _hide(self, answer: str) -> str:
        """A response without the secrets of the request, which the server may repeat."""
        query = urlsplit(self.url).query
        values = [query, *(part.partition("=")[2] for part in query.split("&")), *(v for _, v in parse_qsl(query))]
        secrets = {self._token(), *(value for value in values if len(value) >= _SECRET)} - {""}
        for secret in sorted(secrets, key=len, reverse=True):
            answer = answer.replace(secret, HIDDEN)
        return answer


class _Again(Exception):
    """A failure that may be temporary, with the wait in seconds that the server requests."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Does not follow redirects: a POST would become a GET, and another host would receive the request."""

    def redirect_request(self, *args: Any, **keywords: Any) -> None:
        return None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port or invalid brackets
        return False
    clean = url.isascii() and url.isprintable() and " " not in url and "@" not in parts.netloc
    return whole and clean and parts.scheme in ("http", "https")


def wait_of(retry_after: str | None) -> float:
    """The wait in seconds of a ``Retry-After`` header, which is a number or a date; 0 if it is neither."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def public_address(url: str) -> str:
    """Host, port and path of a URL, which messages may contain."""
    return str(redacted(url)).partition("://")[2].partition("?")[0].removeprefix(f"{HIDDEN}@")


def request_body(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], reward: str) -> bytes:
    """The request as JSON; images float ``[N, 3, H, W]`` in 0..1.

    Raises:
        ValueError: metadata that JSON cannot represent.
    """
    record: Mapping[str, Any] = {
        "images": [base64.b64encode(encode(image, "PNG")).decode("ascii") for image in to_pil(images, reward)],
        "prompts": list(prompts),
        "metadata": [dict(entry) for entry in metadata],
    }
    try:
        return json.dumps(record, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be representable in JSON: {error}") from None


def read_scores(answer: bytes, count: int, reward: str, hide: Callable[[str], str]) -> list[float]:
    """The scores in a response; null becomes NaN. ``hide`` removes secrets from a response before a message shows it.

    Raises:
        RewardError: the response is not ``{"scores": [...]}`` with ``count`` numbers.
    """
    try:
        scores = json.loads(answer)["scores"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        shown = hide(answer.decode("utf-8", "replace"))[:_SHOWN]
        raise RewardError(f'{reward}: the response must be {{"scores": [...]}}, got {shown!r}') from error
    numbers = isinstance(scores, list) and all(
        score is None or (isinstance(score, int | float) and not isinstance(score, bool)) for score in scores
    )
    if not numbers or len(scores) != count:
        raise RewardError(f"{reward}: the response must contain {count} numbers, got {hide(str(scores))[:_SHOWN]}")
    try:
        return [math.nan if score is None else float(score) for score in scores]
    except OverflowError as error:
        raise RewardError(
            f"{reward}: the response must contain {count} numbers in the range of a float, got a larger one"
        ) from error
