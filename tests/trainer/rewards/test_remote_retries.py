"""Rewards over HTTP: which failures are retried, after which wait, and which are not."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
import types
import urllib.error
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

import pytest
from reward_server import Server, breaks_off, in_turn, ok, remote, resets
from torch import Tensor

from star_trainer.rewards import RewardError
from star_trainer.rewards import remote as remote_module
from star_trainer.rewards.remote import RemoteReward, wait_of

pytest.importorskip("PIL")
PROMPTS = ["a cat", "a dog", "", "x"]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503])
def test_temporary_failures_are_retried(server: Server, images: Tensor, status: int) -> None:
    server.answer = in_turn((status, b"busy"), (status, b"busy"), ok([2.0] * 4))
    assert remote(server, retries=2)(images, PROMPTS, [{}] * 4).tolist() == [2.0] * 4
    assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[2]


def test_a_permanent_server_error_contains_the_response(server: Server, images: Tensor) -> None:
    server.answer = lambda body: (503, b"out of memory")
    with pytest.raises(RewardError, match=r"status 503, 'out of memory', in each of 3 attempts"):
        remote(server, retries=2)(images, PROMPTS, [{}] * 4)
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_other_statuses_are_not_retried(server: Server, images: Tensor, status: int) -> None:
    server.answer = lambda body: (status, b"no")
    with pytest.raises(RewardError, match=rf"status {status}, 'no'"):
        remote(server)(images, PROMPTS, [{}] * 4)
    assert len(server.bodies) == 1


def test_a_lost_connection_is_retried(server: Server, images: Tensor) -> None:
    server.drop = 2
    assert remote(server, retries=2)(images, PROMPTS, [{}] * 4).tolist() == [0.5] * 4
    server.drop = 2
    with pytest.raises(RewardError, match=r"connection lost, .* in each of 2 attempts"):
        remote(server, retries=1)(images, PROMPTS, [{}] * 4)


def test_an_unreachable_server_is_an_error_with_its_address(images: Tensor) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}/score"
        with pytest.raises(RewardError, match=rf"{address}: no connection, .* in each of 3 attempts"):
            RemoteReward(f"http://{address}", retries=2, backoff=0.0)(images, PROMPTS, [{}] * 4)


LENGTH = ("Content-Length", "100")
CHUNKED = ("Transfer-Encoding", "chunked")


@pytest.mark.parametrize(
    "answer",
    [
        breaks_off(503, LENGTH),
        breaks_off(429, CHUNKED, body=b"ff\r\nhalf"),
        breaks_off(200, LENGTH, body=b'{"scores": [1'),
        breaks_off(200, CHUNKED, body=b"ff\r\nhalf"),
        breaks_off(200, CHUNKED, body=b"no number\r\n"),
        resets,
    ],
    ids=["503", "429", "200", "chunk", "no chunk", "reset"],
)
def test_a_truncated_response_is_retried(
    server: Server, images: Tensor, answer: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    server.instead = [answer] * 2
    assert remote(server, retries=2)(images, PROMPTS, [{}] * 4).tolist() == [0.5] * 4
    server.instead = [answer] * 2
    with pytest.raises(RewardError, match=r"(status (503|429), '.*'|connection lost, .*), in each of 2 attempts"):
        remote(server, retries=1)(images, PROMPTS, [{}] * 4)


def test_a_truncated_error_response_is_not_retried(server: Server, images: Tensor) -> None:
    server.instead = [breaks_off(404, LENGTH)]
    with pytest.raises(RewardError, match="status 404, 'half'"):
        remote(server)(images, PROMPTS, [{}] * 4)
    assert len(server.bodies) == 1


def test_a_slow_response_is_retried(server: Server, images: Tensor) -> None:
    server.hold = threading.Event()
    reward = remote(server, timeout=0.1, retries=1, backoff=0.01)

    def release(seconds: float) -> None:
        assert server.hold
        reward.timeout = 30.0
        server.hold.set()

    reward._sleep = release
    assert reward(images, PROMPTS, [{}] * 4).tolist() == [0.5] * 4
    reward._opener = StubOpener(TimeoutError())
    with pytest.raises(RewardError, match=r"no response after 30 s, in each of 2 attempts"):
        reward(images, PROMPTS, [{}] * 4)


class StubOpener:
    """An opener that raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0

    def open(self, *_: object, **__: object) -> None:
        self.calls += 1
        raise self.error


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), 3),
        (urllib.error.URLError(ssl.SSLError(1, "[SSL] record layer failure")), 3),
        (OSError(errno.EHOSTUNREACH, "No route to host"), 3),
        (urllib.error.URLError(ssl.SSLCertVerificationError(1, "self-signed certificate")), 1),
    ],
    ids=["eof", "record", "route", "certificate"],
)
def test_tls_errors_are_retried_but_invalid_certificates_are_not(images: Tensor, error: Exception, calls: int) -> None:
    reward = RemoteReward("https://host/x", backoff=0.0, retries=2)
    reward._opener = opener = StubOpener(error)
    with pytest.raises(RewardError, match="host/x: ") as caught:
        reward(images, PROMPTS, [{}] * 4)
    assert opener.calls == calls
    assert "certificate" in str(caught.value) or "in each of 3 attempts" in str(caught.value)


def test_a_response_without_end_is_an_error(server: Server, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_LONGEST", 1 << 20)
    left = threading.Event()

    def stream(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                request.wfile.write(bytes(1 << 16))
        except OSError:
            left.set()

    server.instead = [stream]
    with pytest.raises(RewardError, match="the response must not be longer than 1 MiB"):
        remote(server)(images, PROMPTS, [{}] * 4)
    assert left.wait(30)
    assert len(server.bodies) == 1


class Dripping:
    """An endless response of one byte per second."""

    length = None

    def __init__(self) -> None:
        self.seconds = 0

    def read1(self, count: int) -> bytes:
        self.seconds += 1
        return b" "


def test_a_slow_body_ends_at_the_timeout(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    response = Dripping()
    monkeypatch.setattr(remote_module, "time", types.SimpleNamespace(monotonic=lambda: response.seconds, sleep=None))
    with pytest.raises(TimeoutError):
        remote(server, timeout=20)._fill(bytearray(), response, 1000)
    assert response.seconds == 21


@pytest.mark.parametrize(
    ("header", "waits"),
    [("7", [7.0, 7.0, 7.0]), ("1", [1.0, 1.0, 2.0]), ("100000", [30.0] * 3), ("soon", [0.5, 1.0, 2.0])],
)
def test_retry_after_is_respected_up_to_the_timeout(
    server: Server, images: Tensor, header: str, waits: list[float]
) -> None:
    seen: list[float] = []
    server.headers_back = {"Retry-After": header}
    server.answer = in_turn((429, b""), (503, b""), (429, b""), ok([1.0] * 4))
    reward = remote(server, retries=3, backoff=0.5, timeout=30.0)
    reward._sleep = seen.append
    assert reward(images, PROMPTS, [{}] * 4).tolist() == [1.0] * 4
    assert seen == waits


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("", 0.0),
        ("-3", 0.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("Wed, 99 Oct", 0.0),
        ("9" * 400, 999999999.0),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "time", types.SimpleNamespace(time=lambda: 1445412480.0))
    assert wait_of(header) == seconds


def test_waits_double_with_each_attempt_up_to_the_timeout(server: Server, images: Tensor) -> None:
    waits: list[float] = []
    server.answer = lambda body: (500, b"")
    reward = remote(server, retries=4, backoff=4.0)
    reward._sleep = waits.append
    with pytest.raises(RewardError):
        reward(images, PROMPTS, [{}] * 4)
    assert waits == [4.0, 8.0, 16.0, 30.0]
