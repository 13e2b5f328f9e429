"""Tokens and passwords reach the servers that they are for, and nothing that a run writes or shows."""

from __future__ import annotations

import json
import logging
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, quote_plus

import pytest
import torch
import yaml
from reward_server import Server

from star_trainer import checkpoint, command
from star_trainer.config import Config
from star_trainer.redact import RedactingFormatter, is_secret, redact, redact_warnings, redacted, remember_options
from star_trainer.rewards import RewardError, RewardService, build
from star_trainer.rewards.remote import RemoteReward
from star_trainer.trainer import Trainer

HUB, QUERY, BEARER, PASSWORD = "hf_hubsecret01", "querysecret02", "bearersecret03", "passwordsecret04"
KEY, HEADER, NESTED = "sk-keysecret05", "headersecret06", "nestedsecret07"
SECRETS = (HUB, QUERY, BEARER, PASSWORD, KEY, HEADER, NESTED)
IMAGES = torch.rand(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, HUB)
    monkeypatch.setenv("JUDGE_TOKEN", BEARER)


class Keyed:
    """A reward of the user's, with secrets among its options."""

    name = "keyed"
    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        self.made.append(options)

    def __call__(self, images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        return images.mean((1, 2, 3))


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Settings of that reward."""
    monkeypatch.setattr(Keyed, "made", [])
    module = types.ModuleType("keyed")
    module.Keyed = Keyed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyed", module)

    def settings(key: str = KEY, header: str = HEADER, nested: str = NESTED, max_tokens: int = 5) -> dict[str, Any]:
        client = {"headers": {"X-Judge": header}, "retry": [{"clientSecret": nested}], "max_tokens": max_tokens}
        return {"weights": {"keyed:Keyed": 1.0}, "options": {"keyed:Keyed": {"api_key": key, "client": client}}}

    return settings


@pytest.fixture
def shown(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> Callable[[], str]:
    """All that has come out: standard output and error, logs of every level, warnings."""
    caplog.set_level(logging.DEBUG)

    def collect() -> str:
        return "\n".join([*capfd.readouterr(), caplog.text, *(str(warning.message) for warning in recwarn)])

    return collect


@pytest.fixture
def star_train(configure: Callable[..., Config], tmp_path: Path) -> Callable[..., int]:
    """Runs the command with the settings of a file."""

    def run(**parts: dict[str, Any]) -> int:
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(asdict(configure(**parts))))
        return command.main(["--config", str(path)])

    return run


def judge(server: Server, token: str = QUERY, **options: Any) -> dict[str, Any]:
    """Settings of a reward with a secret in its address and one in its header."""
    url = f"{server.url}?token={token}"
    return {"weights": {url: 1.0}, "options": {url: {"token_env": "JUDGE_TOKEN", "backoff": 0.0, **options}}}


def without_secrets(text: str | bytes) -> bool:
    data = text if isinstance(text, bytes) else text.encode()
    return not any(secret.encode() in data for secret in SECRETS)


def both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Settings of two rewards."""
    return {part: one[part] | other[part] for part in ("weights", "options")}


def test_a_run_writes_and_shows_none(
    server: Server,
    keyed: Callable[..., dict[str, Any]],
    star_train: Callable[..., int],
    shown: Callable[[], str],
    tmp_path: Path,
) -> None:
    reward = both(judge(server), keyed())
    status = star_train(reward=reward, evaluation={"every": 1}, output={"tensorboard": True, "pictures_every": 1})
    assert status == 0
    assert Keyed.made == [reward["options"]["keyed:Keyed"]]
    assert set(server.paths) == {f"/score?token={QUERY}"}
    assert server.headers[0]["authorization"] == f"Bearer {BEARER}"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "config.json", "state.json", "weights.safetensors"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    assert [path for path in files if not without_secrets(path.read_bytes())] == []
    assert without_secrets(shown())
    assert redact(f"{server.url}?token=x") in (tmp_path / "run" / "config.json").read_text()  # what remains is there


def test_a_run_is_resumed_with_another_token(
    server: Server,
    keyed: Callable[..., dict[str, Any]],
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
) -> None:
    trainer_of(configure(reward=both(judge(server, QUERY), keyed()))).run()
    more: dict[str, Any] = {"train": {"epochs": 2}, "output": {"resume": True}}
    changed = both(judge(server, QUERY), keyed(max_tokens=6))
    with pytest.raises(ValueError, match=r"keyed:Keyed\.client\.max_tokens: 5 there, 6 here"):
        trainer_of(configure(reward=changed, **more))
    others = keyed("another-key", "another-header", "another-secret")
    resumed = trainer_of(configure(reward=both(judge(server, "another-one"), others), **more))
    assert resumed.epoch == 1
    resumed.run()
    assert server.paths[-1] == "/score?token=another-one"
    other = {"weights": {f"http://elsewhere/score?token={QUERY}": 1.0}}
    with pytest.raises(ValueError, match=r"is of another configuration: reward\..*elsewhere/score\?\*\*\*") as caught:
        trainer_of(configure(reward=other, train={"epochs": 3}, output={"resume": True}))
    assert without_secrets(str(caught.value))


def test_a_checkpoint_that_holds_an_address_in_full_is_resumed(
    server: Server, configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    """As checkpoints were written before addresses were redacted."""
    config = configure(reward=judge(server))
    trainer_of(config).run()
    path = tmp_path / "run" / "checkpoint-000001" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "config": asdict(config)}))
    more: dict[str, Any] = {"train": {"epochs": 2}, "output": {"resume": True}}
    assert trainer_of(configure(reward=judge(server), **more)).epoch == 1
    assert [p.name for p in checkpoint.find(tmp_path / "run")] == ["checkpoint-000001"]


def repeats_the_request(status: int) -> tuple[int, bytes]:
    return status, f"no such judge: /score?token={QUERY}, Authorization: Bearer {BEARER}".encode()


@pytest.mark.parametrize("status", [200, 403, 500])
def test_a_server_that_repeats_the_request_is_not_quoted_in_full(
    server: Server, star_train: Callable[..., int], shown: Callable[[], str], status: int
) -> None:
    server.answer = lambda body: repeats_the_request(status)
    assert star_train(reward=judge(server, retries=1)) == 1
    text = shown()
    assert "no such judge: /score?***, Authorization: Bearer ***" in text
    assert without_secrets(text)


@pytest.mark.parametrize("status", [200, 403, 500])
def test_samples_are_skipped_without_quoting_the_request(
    server: Server, configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], status: int
) -> None:
    server.answer = lambda body: repeats_the_request(status)
    trainer = trainer_of(configure(reward={**judge(server, retries=0), "on_failure": "skip"}))
    with pytest.warns(RuntimeWarning, match="no such judge") as warned, pytest.raises(RewardError):
        trainer.run()
    assert all(without_secrets(str(warning.message)) for warning in warned)


class Quoting:
    """Fails as clients of HTTP do."""

    name = "quoting"

    def __call__(self, *_: Any) -> torch.Tensor:
        raise OSError(f"401 Client Error for url: https://me:{PASSWORD}@host/score?token={QUERY}")


@pytest.mark.parametrize("on_failure", ["stop", "skip"])
def test_an_address_in_the_message_of_a_reward_is_shortened(on_failure: Any) -> None:
    with RewardService(Quoting(), on_failure=on_failure) as service:
        pending = service.submit(IMAGES, ["a", "b"], [{}, {}], indices=[0, 1])
        if on_failure == "stop":
            with pytest.raises(RewardError) as caught:
                pending.result()
            messages = [str(caught.value)]
        else:
            with pytest.warns(RuntimeWarning) as warned:
                pending.result()
            messages = [str(warning.message) for warning in warned]
    for message in messages:
        assert "401 Client Error for url: https://***@host/score?***" in message
        assert without_secrets(message)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"weights": {f"https://me:{PASSWORD}@host/score": 1.0}}, "without a user or password"),
        ({"weights": {f"https://me:{PASSWORD}/2@host/score": 1.0}}, "without a user or password"),
        ({"weights": {f"https://host:{PASSWORD}/score": 1.0}}, "without a user or password"),
        ({"weights": {f"https://host/score?token=a {QUERY}": 1.0}}, "without a user or password"),
        ({"weights": {f"ftp://me:{PASSWORD}@host/score": 1.0}}, "unknown reward 'ftp://***@host/score'"),
        ({"weights": {"ocr": 1.0}, "options": {f"https://host/score?token={QUERY}": {}}}, "options must be for"),
        ({"weights": {f"https://host/score?token={QUERY}": 1.0}, "options": {"ocr": {}}}, "options must be for"),
    ],
    ids=["user", "slash", "port", "blank", "scheme", "options", "weights"],
)
def test_settings_that_are_wrong_are_named_without_them(
    star_train: Callable[..., int], shown: Callable[[], str], reward: dict[str, Any], message: str
) -> None:
    assert star_train(reward=reward) == 1
    text = shown()
    assert message in text
    assert without_secrets(text)


class Chain:
    """A trainer that fails as no setting explains, for a reason that quotes secrets."""

    def __init__(self, config: Config) -> None:
        try:
            raise OSError(f"401 Client Error for url: https://me:{PASSWORD}@host/score?token={QUERY}")
        except OSError as error:
            raise RuntimeError(f"Authorization: Bearer {BEARER}, password={NESTED!r}") from error


def test_tracebacks_of_unexpected_errors_are_printed_without_them(
    monkeypatch: pytest.MonkeyPatch, star_train: Callable[..., int], shown: Callable[[], str]
) -> None:
    monkeypatch.setattr("star_trainer.trainer.Trainer", Chain)
    assert star_train() == 1
    text = shown()
    assert text.count("Traceback (most recent call last)") == 2
    assert "OSError: 401 Client Error for url: https://***@host/score?***" in text
    assert "RuntimeError: Authorization: Bearer ***, password='***'" in text
    assert without_secrets(text)


def test_logged_exceptions_are_formatted_without_them() -> None:
    try:
        raise OSError(f"https://me:{PASSWORD}@host")
    except OSError:
        record = logging.LogRecord("x", 40, __file__, 1, "token: %s", (QUERY,), sys.exc_info())
    text = RedactingFormatter().format(record)
    assert "token: ***" in text
    assert "https://***@host" in text
    assert without_secrets(text)


def test_warnings_are_printed_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    redact_warnings()
    text = warnings.formatwarning(UserWarning(f"https://me:{PASSWORD}@host, token={QUERY}"), UserWarning, "f.py", 3)
    assert text.startswith("f.py:3: UserWarning: https://***@host")
    assert without_secrets(text)


def test_the_secrets_of_options_are_hidden_wherever_they_come_again(
    keyed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = keyed()
    build(settings["weights"], options=settings["options"])
    assert redact(f"no such key: {KEY!r}, {HEADER} {NESTED}") == "no such key: '***', *** ***"


@pytest.mark.parametrize("written", [repr, json.dumps, quote, quote_plus, lambda text: quote(text, safe="")])
def test_a_secret_is_hidden_however_it_is_escaped(written: Callable[[str], str]) -> None:
    secret = 'p@ss "w\u00f6rd"/\\x'
    remember_options({"password": secret, "pin": {"secret": 73519462}})
    assert redact(f"x {written(secret).strip(chr(34) + chr(39))} 73519462") == "x *** ***"


def test_options_that_do_not_fit_are_refused_without_them(keyed: Callable[..., dict[str, Any]]) -> None:
    def make(api_key: str = KEY, limit: str = "no secret") -> Keyed:
        return Keyed()

    sys.modules["keyed"].make = make  # type: ignore[attr-defined]
    sys.modules["keyed"].ready = Keyed()  # type: ignore[attr-defined]
    options = keyed()["options"]["keyed:Keyed"]
    with pytest.raises(ValueError, match=r"must fit make.*= 'no secret'.*'client'") as caught:
        build({"keyed:make": 1.0}, options={"keyed:make": options})
    with pytest.raises(ValueError, match=r"it is a reward already, got .*'max_tokens': 5") as other:
        build({"keyed:ready": 1.0}, options={"keyed:ready": options})
    assert without_secrets(f"{caught.value} {other.value}")


SECRET_NAMES = """
    api_key apiKey API-Key X-Api-Key OPENAI_API_KEY token hf_token accessToken api_tokens token_value secret
    client_secret password db.password passwd passphrase credentials authorization Authorization auth headers
    auth_header extra_headers Cookie private_key secretAccessKey bearer password2 api_key_1 openai_key creds
"""
OTHER_NAMES = """
    token_env max_tokens num_tokens tokens tokenizer pad_token eos_token stop_token token_url key keys image_key
    sort_key keyboard author secretary password_file passes monkey mine:Token https://host/token ocr
"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_names_of_what_is_no_secret(name: str) -> None:
    assert not is_secret(name)


def test_options_named_like_secrets_keep_their_shape() -> None:
    options = {
        "token": "abc",
        "api_key": None,
        "use_auth": True,
        "headers": {"Authorization": "Bearer abc", "n": [1, 2]},
        "clients": [{"password": 1234, "user": "me"}],
        "auth": ("me", "abc"),
    }
    expected = {
        "token": "***",
        "api_key": None,
        "use_auth": True,
        "headers": {"Authorization": "***", "n": ["***", "***"]},
        "clients": [{"password": "***", "user": "me"}],
        "auth": ["***", "***"],
    }
    assert redacted(options) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bad {'api_key': 'abc def', 'n': 3}", "bad {'api_key': '***', 'n': 3}"),
        ('{"token": "abc", "n": 3}', '{"token": "***", "n": 3}'),
        (r'"{\"token\": \"abc\"}"', r'"{\"token\": \"***"}"'),
        ("password=abc, user=me", "password=***, user=me"),
        ("--judge.api-key=abc self._token = 'abc'", "--judge.api-key=*** self._token = '***'"),
        ("Authorization: Bearer abc; x", "Authorization: Bearer ***; x"),
        ("token: None, max_tokens=5, pad_token: '<pad>'", "token: None, max_tokens=5, pad_token: '<pad>'"),
        ("the token is wrong: try again", "the token is wrong: try again"),
        ("ValueError: token=abc", "ValueError: token=***"),
        ("note: 'no api_key: abc', x", "note: 'no api_key: ***', x"),
        ("{'X-Api-Key': b'abc', 'n': b'3'}", "{'X-Api-Key': b'***', 'n': b'3'}"),
        ("arguments: --judge.api_key=abc --n 3 --token abc -v", "arguments: --judge.api_key=*** --n 3 --token *** -v"),
        ("('Authorization', 'Bearer abc123'), Bearer authority", "('Authorization', 'Bearer ***'), Bearer authority"),
        (
            "retries exceeded with url: /v1/score?key=abc (Caused by",
            "retries exceeded with url: /v1/score?*** (Caused by",
        ),
    ],
)
def test_what_a_text_shows_of_named_secrets(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


ADDRESS = f"https://me:{PASSWORD}@host/score?token=a {QUERY}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"reward: {{weights: {{'{ADDRESS}': .nan}}}}",
            "reward.weights of 'https://***@host/score?***' must be finite",
        ),
        (f"reward: {{weights: {{'{ADDRESS}': 1, '{ADDRESS}': 2}}}}", "'https://***@host/score?***' appears twice"),
        (f"reward:\n  '{ADDRESS}': 1", "line 2: unknown setting reward.https://***@host/score?***"),
        (f"reward: '{ADDRESS}'", "reward must be a section of settings, got 'https://***@host/score?***'"),
        (f"- '{ADDRESS}'", "must hold sections of settings"),
    ],
    ids=["value", "twice", "unknown", "section", "list"],
)
def test_files_that_are_wrong_are_named_without_them(
    shown: Callable[[], str], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--config", str(tmp_path / "mine.yaml")])
    said = shown()
    assert message in said
    assert without_secrets(said)


def test_options_that_cannot_be_read_are_quoted_without_them(shown: Callable[[], str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--reward.weights", f'{{"https://me:{PASSWORD}@host/score?token={QUERY}": 1.0'])
    text = shown()
    assert "https://***@host/score?***" in text
    assert without_secrets(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host:81/a/@me/b", "https://host:81/a/@me/b"),
        ("https://host/a?token=x#y", "https://host/a?***"),
        ("HTTPS://host#access_token=x", "HTTPS://host?***"),
        ("https://me@host/a", "https://***@host/a"),
        ("https://me:p@ss/w@host/a", "https://***@host/a"),
        ("https://host:word/a", "https://host:***/a"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
        ("see 'http://a/b?c=d', or http://e:f@g/h?i.", "see 'http://a/b?***', or http://***@g/h?***"),
        ("is 3 > 2? yes: a/b@c", "is 3 > 2? yes: a/b@c"),
    ],
)
def test_what_an_address_shows(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


def test_settings_that_differ_in_what_is_hidden_stay_apart() -> None:
    settings = {"weights": {"http://a/b?x": 1.0, "http://a/b?y": 2.0}, "list": ["http://a?b c", 3, None], "n": 4}
    expected = {"weights": {"http://a/b?***": 1.0, "http://a/b?***#2": 2.0}, "list": ["http://a?***", 3, None], "n": 4}
    assert redacted(settings) == expected
    assert redacted(expected) == expected


def test_the_values_of_an_address_are_hidden_however_they_are_written() -> None:
    reward = RemoteReward("http://host/score?model=clip&token=secret%2Fsecret")
    hidden = "***"
    for text in ("model=clip&token=secret%2Fsecret", "secret%2Fsecret", "secret/secret"):
        assert reward._hide(text) == hidden
    assert reward._hide("no model clip") == "no model clip"  # what is short is no secret
