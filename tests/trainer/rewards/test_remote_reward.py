"""Rewards over HTTP, with a server in this process."""

from __future__ import annotations

import base64
import io
import json
import math
import traceback
from typing import Any

import pytest
import torch
from reward_server import Server, ok, remote
from torch import Tensor

from star_trainer.rewards import RewardError, RewardService
from star_trainer.rewards.images import to_uint8
from star_trainer.rewards.remote import RemoteReward

pytest.importorskip("PIL")
PROMPTS = ["a cat", "ein Stra\u00dfenschild", "", "x"]
TOKEN = "tok-5f2c"


def test_the_server_receives_images_prompts_and_metadata(server: Server, images: Tensor) -> None:
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


def test_an_empty_batch_makes_no_request(server: Server) -> None:
    assert remote(server)(torch.empty(0, 3, 4, 4), [], []).shape == (0,)
    assert server.bodies == []


def test_null_is_a_sample_without_a_score(server: Server, images: Tensor) -> None:
    server.answer = lambda body: ok([1.0, None, 3.0, 4.0])
    scores = remote(server)(images, PROMPTS, [{}] * 4)
    assert [math.isnan(score) for score in scores.tolist()] == [False, True, False, False]


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
        b"[" * 100000,
        b'{"scores": [1, 2, 3, 1%s]}' % (b"0" * 400),
    ],
    ids=lambda answer: repr(answer[:30]),
)
def test_a_response_in_another_format_is_an_error(server: Server, images: Tensor, answer: bytes) -> None:
    server.answer = lambda body: (200, answer)
    with pytest.raises(RewardError, match=r"the response must (be|contain)"):
        remote(server)(images, PROMPTS, [{}] * 4)


def test_redirects_are_not_followed(server: Server, images: Tensor) -> None:
    server.location = server.url
    for status in (301, 302, 303, 307, 308):
        server.answer = lambda body, status=status: (status, b"")
        with pytest.raises(RewardError, match=f"status {status}"):
            remote(server)(images, PROMPTS, [{}] * 4)
    assert server.methods == ["POST"] * 5


def test_a_token_is_only_sent_in_its_header(server: Server, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_newline_at_the_end_of_a_mounted_secret_is_left_out(
    server: Server, images: Tensor, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN + end)
    remote(server, token_env="MY_TOKEN")(images, PROMPTS, [{}] * 4)
    assert server.headers[0]["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    "token", [f"{TOKEN}\n\n", f"{TOKEN}\nx", f"\r{TOKEN}", f"{TOKEN}\x7f", f"{TOKEN}\u20ac"], ids=repr
)
def test_an_error_about_an_invalid_token_does_not_contain_it(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("MY_TOKEN", token)
    with pytest.raises(ValueError, match="'MY_TOKEN', whose value must be printable ASCII characters") as caught:
        RemoteReward("http://127.0.0.1/x", token_env="MY_TOKEN")
    assert "".join(traceback.format_exception(caught.value)).count(TOKEN) == 0


@pytest.mark.parametrize("token", [None, "", "\n"])
def test_a_token_that_is_not_set_is_refused(monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("MY_TOKEN", token)
    with pytest.raises(ValueError, match="'MY_TOKEN', which is not set"):
        RemoteReward("http://127.0.0.1/x", token_env="MY_TOKEN")


def test_a_token_in_place_of_its_variable_is_not_shown() -> None:
    with pytest.raises(ValueError, match=r"the environment variable \(not shown\), which is not set"):
        RemoteReward("http://127.0.0.1/x", token_env=TOKEN)


def test_the_name_shows_no_query(server: Server) -> None:
    assert RemoteReward("https://host:81/a/b?key=secret").name == "host:81/a/b"
    assert RemoteReward("https://host/a", name="mine").name == "mine"


@pytest.mark.parametrize(
    "url", ["http://user:secret@host/x", "http:///x", "ftp://host/x", "host/x", "http://host/\u00fc?key=secret", 3]
)
def test_an_error_about_a_wrong_address_hides_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="without user and password") as caught:
        RemoteReward(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"timeout": 0}, ValueError),
        ({"timeout": math.nan}, ValueError),
        ({"timeout": "30"}, TypeError),
        ({"retries": -1}, ValueError),
        ({"retries": 1.5}, TypeError),
        ({"backoff": -1}, ValueError),
        ({"backoff": math.inf}, ValueError),
        ({"batch_size": 0}, ValueError),
        ({"batch_size": True}, TypeError),
        ({"token_env": 3}, TypeError),
        ({"name": ["x"]}, TypeError),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(setting: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{next(iter(setting))} must be"):
        RemoteReward("http://host/x", **setting)


def test_metadata_that_json_cannot_represent_is_refused(server: Server, images: Tensor) -> None:
    for value in (object(), math.nan):
        with pytest.raises(ValueError, match="metadata must be representable in JSON"):
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
