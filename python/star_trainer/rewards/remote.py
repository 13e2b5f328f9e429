"""Rewards that a server computes, over HTTP.

The protocol, for whoever writes a server. A request is a POST of JSON::

    {"images": ["<base64 of a PNG>", ...], "prompts": ["...", ...], "metadata": [{...}, ...]}

The answer has status 200 and a score for each image, in order; null, or NaN, for one that could not be scored::

    {"scores": [0.25, null, ...]}

A status of 500 and above, and a connection that fails, are tried again; any other status is final, redirections
included. With a token the request carries ``Authorization: Bearer <token>``: use https then, unless the server is at
hand.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
from torch import Tensor

from star_trainer.redact import HIDDEN, redacted
from star_trainer.rewards.base import Metadata, RewardError
from star_trainer.rewards.images import encode, slices, to_pil

_SHOWN = 200  # characters of a server's answer in an error message
_SECRET = 8  # characters of the shortest value in an address that may be one


class RemoteReward:
    """Posts images to a server and returns its scores; see the module for the protocol.

    Args:
        url: an http or https address without a user or a password. Its query, which may hold a token, is not shown.
        timeout: seconds to wait for a connection, and for any part of the answer.
        retries: how often a request is made again after a failed connection or a status of 500 and above. A server
            that takes longer than the timeout is not asked again: it may still be at work.
        backoff: seconds before the first retry; they double with each.
        batch_size: images in a request; None is all.
        token_env: name of the environment variable that holds a token. Its value goes into the request, never into a
            message.
        name: the reward's name; None is host and path of the address.

    Raises:
        ValueError: an address or a number that is not as above, or an environment variable that is not set.
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
        if not _is_address(url):
            shown = repr(redacted(url)) if "://" in url else "none of these"
            raise ValueError(f"url must be http(s)://host/path without a user or password, got {shown}")
        if not (timeout > 0 and retries >= 0 and backoff >= 0 and (batch_size is None or batch_size >= 1)):
            raise ValueError(
                "timeout must be positive, retries and backoff not negative, batch_size at least 1 or None, got "
                f"{timeout}, {retries}, {backoff}, {batch_size}"
            )
        if token_env is not None and not os.environ.get(token_env):
            raise ValueError(f"token_env names the environment variable {token_env!r}, which is not set")
        self.url = url
        self.name = public_address(url) if name is None else name
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.batch_size = batch_size
        self._token_env = token_env
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The server's scores.

        Raises:
            RewardError: the server cannot be reached, refuses, or answers something else than the protocol.
            ValueError: metadata that JSON cannot hold.
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
                    raise RewardError(f"{self.name}: {problem}, {attempt + 1} times in a row") from problem.__cause__
            if self.backoff:
                time.sleep(self.backoff * 2**attempt)
            attempt += 1

    def _send(self, body: bytes) -> bytes:
        token = self._token()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self.url, body, headers, method="POST")
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                answer: bytes = response.read()
                return answer
        except urllib.error.HTTPError as error:
            with error:
                shown = error.read(4 * _SHOWN).decode("utf-8", "replace")
            message = f"status {error.code}, {self._hide(shown)[:_SHOWN]!r}"
            raise (_Again(message) if error.code >= 500 else RewardError(f"{self.name}: {message}")) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                raise RewardError(f"{self.name}: {error.reason}") from error
            raise _Again(f"no connection, {error.reason}") from error
        except TimeoutError as error:
            raise RewardError(f"{self.name}: no answer after {self.timeout:g} s") from error
        except (ConnectionError, http.client.HTTPException) as error:
            raise _Again(f"the connection broke, {type(error).__name__}: {error}") from error

    def _token(self) -> str:
        return os.environ.get(self._token_env, "") if self._token_env else ""

    def _hide(self, answer: str) -> str:
        """What a server says, without the secrets of the request, which it may repeat."""
        query = urlsplit(self.url).query
        values = [query, *(part.partition("=")[2] for part in query.split("&")), *(v for _, v in parse_qsl(query))]
        secrets = {self._token(), *(value for value in values if len(value) >= _SECRET)} - {""}
        for secret in sorted(secrets, key=len, reverse=True):
            answer = answer.replace(secret, HIDDEN)
        return answer


class _Again(Exception):
    """A failure that a further attempt may mend."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: a POST would become a GET, and another host would see the request."""

    def redirect_request(self, *args: Any, **keywords: Any) -> None:
        return None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets without an address
        return False
    clean = url.isprintable() and " " not in url and "@" not in parts.netloc
    return whole and clean and parts.scheme in ("http", "https")


def public_address(url: str) -> str:
    """Host, port and path of an address: what may be shown of it."""
    return str(redacted(url)).partition("://")[2].partition("?")[0].removeprefix(f"{HIDDEN}@")


def request_body(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], reward: str) -> bytes:
    """The request as JSON; images float ``[N, 3, H, W]`` in 0..1.

    Raises:
        ValueError: metadata that JSON cannot hold.
    """
    record: Mapping[str, Any] = {
        "images": [base64.b64encode(encode(image, "PNG")).decode("ascii") for image in to_pil(images, reward)],
        "prompts": list(prompts),
        "metadata": [dict(entry) for entry in metadata],
    }
    try:
        return json.dumps(record, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be what JSON can hold: {error}") from None


def read_scores(answer: bytes, count: int, reward: str, hide: Callable[[str], str]) -> list[float]:
    """The scores in a server's answer; null is NaN. What a message shows of the answer goes through ``hide``.

    Raises:
        RewardError: the answer is not ``{"scores": [...]}`` with ``count`` numbers.
    """
    try:
        scores = json.loads(answer)["scores"]
    except (ValueError, KeyError, TypeError) as error:
        shown = hide(answer.decode("utf-8", "replace"))[:_SHOWN]
        raise RewardError(f'{reward}: the answer is not {{"scores": [...]}}: {shown!r}') from error
    numbers = isinstance(scores, list) and all(
        score is None or (isinstance(score, int | float) and not isinstance(score, bool)) for score in scores
    )
    if not numbers or len(scores) != count:
        raise RewardError(f"{reward}: the answer must hold {count} numbers, got {hide(str(scores))[:_SHOWN]}")
    return [math.nan if score is None else float(score) for score in scores]
