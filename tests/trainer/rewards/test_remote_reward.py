"""Rewards over HTTP, with a server in this process."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reward_server import Server, ok
from torch import Tensor

from star_trainer.rewards import RewardError, RewardService
from star_trainer.rewards.images import to_uint8
from star_trainer.rewards.remote import RemoteReward

pytest.importorskip("PIL")
PROMPTS = ["a cat", "ein Stra\u00dfenschild", "", "x"]
TOKEN = "tok-5f2c"


def in_turn(*answers: tuple[int, bytes]) -> Callable[[dict[str, Any]], tuple[int, bytes]]:
    left = list(answers)
    return lambda body: left.pop(0)


def remote(server: Server, **options: Any) -> RemoteReward:
    return RemoteReward(server.url, **{"backoff": 0.0, "timeout": 30.0, **options})


def test_images_prompts_and_metadata_arrive_as_they_are(server: Server, images: Tensor) -> None:
    from PIL import Image

    server.answer = lambda body: ok([1, 0.25, -3, 1e3])
    metadata = [{"text": "a"}, {"include": [{"class": "dog", "count": 1}]}, {}, {"n": 1.5}]
    scores = remote(server)(images, PROMPTS, metadata)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 0.25, -3.0, 1000.0]
    [body] = server.bodies
    assert body["prompts"] == PROMPTS
    assert body["metadata"] == metadata
    for png, expected in zip(body["images"], to_uint8(images), strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(png)))
        assert image.format == "PNG"
        assert image.tobytes() == expected.numpy().tobytes()


def test_a_batch_size_splits_the_request(server: Server, images: Tensor) -> None:
    server.answer = lambda body: ok([float(PROMPTS.index(prompt)) for prompt in body["prompts"]])
    assert remote(server, batch_size=3)(images, PROMPTS, [{}] * 4).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert [len(body["images"]) for body in server.bodies] == [3, 1]


def test_no_images_need_no_request(server: Server) -> None:
    assert remote(server)(torch.empty(0, 3, 4, 4), [], []).shape == (0,)
    assert server.bodies == []


def test_null_is_a_sample_without_a_score(server: Server, images: Tensor) -> None:
    server.answer = lambda body: ok([1.0, None, 3.0, 4.0])
    scores = remote(server)(images, PROMPTS, [{}] * 4)
    assert [math.isnan(score) for score in scores.tolist()] == [False, True, False, False]


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_error_is_tried_again(server: Server, images: Tensor, status: int) -> None:
    server.answer = in_turn((status, b"busy"), (status, b"busy"), ok([2.0] * 4))
    assert remote(server, retries=2)(images, PROMPTS, [{}] * 4).tolist() == [2.0] * 4
    assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[2]


def test_a_server_error_that_stays_is_an_error_with_what_the_server_says(server: Server, images: Tensor) -> None:
    server.answer = lambda body: (503, b"out of memory")
    with pytest.raises(RewardError, match=r"status 503, 'out of memory', 3 times in a row"):
        remote(server, retries=2)(images, PROMPTS, [{}] * 4)
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429])
def test_a_refusal_is_final(server: Server, images: Tensor, status: int) -> None:
    server.answer = lambda body: (status, b"no")
    with pytest.raises(RewardError, match=rf"status {status}, 'no'"):
        remote(server)(images, PROMPTS, [{}] * 4)
    assert len(server.bodies) == 1


def test_a_broken_connection_is_tried_again(server: Server, images: Tensor) -> None:
    server.drop = 2
    assert remote(server, retries=2)(images, PROMPTS, [{}] * 4).tolist() == [0.5] * 4
    server.drop = 2
    with pytest.raises(RewardError, match=r"the connection broke, .* 2 times in a row"):
        remote(server, retries=1)(images, PROMPTS, [{}] * 4)


def test_a_server_that_is_not_there_is_an_error_with_its_address(images: Tensor) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}/score"
        with pytest.raises(RewardError, match=rf"{address}: no connection, .* 3 times in a row"):
            RemoteReward(f"http://{address}", retries=2, backoff=0.0)(images, PROMPTS, [{}] * 4)


def test_an_answer_that_takes_too_long_is_an_error_and_not_asked_for_again(server: Server, images: Tensor) -> None:
    server.hold = threading.Event()
    with pytest.raises(RewardError, match=r"no answer after 0.1 s"):
        remote(server, timeout=0.1)(images, PROMPTS, [{}] * 4)
    assert len(server.bodies) <= 1  # a slow machine may not have read it yet


def test_waits_double_from_attempt_to_attempt(server: Server, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("star_trainer.rewards.remote.time.sleep", waits.append)
    server.answer = lambda body: (500, b"")
    with pytest.raises(RewardError):
        remote(server, retries=3, backoff=0.5)(images, PROMPTS, [{}] * 4)
    assert waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    "answer",
    [
        b"not json",
        b"[]",
        b'"scores"',
        b"{}",
        b'{"scores": 1}',
        b'{"scores": [1, 2, 3]}',
        b'{"scores": [1, 2, 3, "4"]}',
        b'{"scores": [1, 2, 3, true]}',
        b'{"scores": [[1], [2], [3], [4]]}',
        b"\xff\xfe",
    ],
    ids=repr,
)
def test_an_answer_that_is_not_the_protocol_is_an_error(server: Server, images: Tensor, answer: bytes) -> None:
    server.answer = lambda body: (200, answer)
    with pytest.raises(RewardError, match=r"the answer (is not|must hold)"):
        remote(server)(images, PROMPTS, [{}] * 4)


def test_redirections_are_not_followed(server: Server, images: Tensor) -> None:
    server.location = server.url
    for status in (301, 302, 303, 307, 308):
        server.answer = lambda body, status=status: (status, b"")
        with pytest.raises(RewardError, match=f"status {status}"):
            remote(server)(images, PROMPTS, [{}] * 4)
    assert server.methods == ["POST"] * 5


def test_a_token_goes_into_the_request_and_nowhere_else(
    server: Server, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    reward = remote(server, token_env="MY_TOKEN")
    reward(images, PROMPTS, [{}] * 4)
    assert server.headers[0]["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in json.dumps(server.bodies)
    assert TOKEN not in f"{reward.name} {vars(reward)}"
    server.answer = lambda body: (401, f"bad token {TOKEN}".encode())
    with pytest.raises(RewardError, match=r"bad token \*\*\*") as caught:
        reward(images, PROMPTS, [{}] * 4)
    assert TOKEN not in str(caught.value)


def test_without_a_token_there_is_no_authorization(server: Server, images: Tensor) -> None:
    remote(server)(images, PROMPTS, [{}] * 4)
    assert "authorization" not in server.headers[0]


def test_a_token_that_is_not_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(ValueError, match="'MY_TOKEN', which is not set"):
        RemoteReward("http://127.0.0.1/x", token_env="MY_TOKEN")


def test_the_name_shows_no_query(server: Server) -> None:
    assert RemoteReward("https://host:81/a/b?key=secret").name == "host:81/a/b"
    assert RemoteReward("https://host/a", name="mine").name == "mine"


@pytest.mark.parametrize("url", ["http://user:secret@host/x", "http:///x", "ftp://host/x", "host/x"])
def test_a_wrong_address_is_refused_and_no_password_shown(url: str) -> None:
    with pytest.raises(ValueError, match="without a user or password") as caught:
        RemoteReward(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"timeout": 0}, {"retries": -1}, {"backoff": -1}, {"batch_size": 0}], ids=str)
def test_a_wrong_setting_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="timeout must be positive"):
        RemoteReward("http://host/x", **setting)


def test_metadata_that_json_cannot_hold_is_refused(server: Server, images: Tensor) -> None:
    for value in (object(), math.nan):
        with pytest.raises(ValueError, match="metadata must be what JSON can hold"):
            remote(server)(images, PROMPTS, [{"x": value}] * 4)
    assert server.bodies == []


def test_in_the_service_a_sample_that_the_server_cannot_score_is_named(server: Server, images: Tensor) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, bytes]:
        return (500, b"crash") if "a cat" in body["prompts"] else ok([1.0] * len(body["prompts"]))

    server.answer = answer
    with RewardService(remote(server, retries=0), on_failure="skip") as service:
        pending = service.submit(images, PROMPTS, [{}] * 4, indices=range(4))
        with pytest.warns(RuntimeWarning, match=r"sample 0 \('a cat'\): RewardError: .*status 500, 'crash'"):
            scores = pending.result()
    assert scores.total.isnan().tolist() == [True, False, False, False]
