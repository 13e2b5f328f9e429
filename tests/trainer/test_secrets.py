"""Tokens and passwords reach their servers, but no file, log or message of a run."""

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

import pytest
import torch
import yaml
from reward_server import Server

from star_trainer import checkpoint, command
from star_trainer.config import Config
from star_trainer.redact import RedactingFormatter, redact, redact_warnings
from star_trainer.rewards import RewardError, RewardService, build
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
    """A user's reward with secrets among its options."""

    name = "keyed"
    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        self.made.append(options)

    def __call__(self, images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        return images.mean((1, 2, 3))


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Settings of the reward ``Keyed``."""
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
    """Returns all output so far: standard output and error, logs of all levels, warnings."""
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
    """Settings of a remote reward with a secret in its address and another in its header."""
    url = f"{server.url}?token={token}"
    return {"weights": {url: 1.0}, "options": {url: {"token_env": "JUDGE_TOKEN", "backoff": 0.0, **options}}}


def without_secrets(text: str | bytes) -> bool:
    data = text if isinstance(text, bytes) else text.encode()
    return not any(secret.encode() in data for secret in SECRETS)


def both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Settings with two rewards."""
    return {part: one[part] | other[part] for part in ("weights", "options")}


def test_no_output_of_a_run_contains_secrets(
    server: Server,
    keyed: Callable[..., dict[str, Any]],
    star_train: Callable[..., int],
    shown: Callable[[], str],
    tmp_path: Path,
) -> None:
    reward = both(judge(server), keyed())
    status = star_train(reward=reward, evaluation={"every": 1}, output={"trackers": ["tensorboard"], "images_every": 1})
    assert status == 0
    assert Keyed.made == [reward["options"]["keyed:Keyed"]]
    assert set(server.paths) == {f"/score?token={QUERY}"}
    assert server.headers[0]["authorization"] == f"Bearer {BEARER}"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "config.json", "state.json", "weights.safetensors"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    assert [path for path in files if not without_secrets(path.read_bytes())] == []
    assert without_secrets(shown())
    assert redact(f"{server.url}?token=x") in (tmp_path / "run" / "config.json").read_text()


def test_a_run_is_resumed_with_another_token(
    server: Server,
    keyed: Callable[..., dict[str, Any]],
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
) -> None:
    trainer_of(configure(reward=both(judge(server, QUERY), keyed()))).run()
    more: dict[str, Any] = {"train": {"epochs": 2}, "output": {"resume": True}}
    changed = both(judge(server, QUERY), keyed(max_tokens=6))
    with pytest.raises(ValueError, match=r"keyed:Keyed\.client\.max_tokens: 5 in the checkpoint, 6 now"):
        trainer_of(configure(reward=changed, **more))
    others = keyed("another-key", "another-header", "another-secret")
    resumed = trainer_of(configure(reward=both(judge(server, "another-one"), others), **more))
    assert resumed.epoch == 1
    resumed.run()
    assert server.paths[-1] == "/score?token=another-one"
    other = {"weights": {f"http://elsewhere/score?token={QUERY}": 1.0}}
    with pytest.raises(ValueError, match=r"has another configuration: reward\..*elsewhere/score\?\*\*\*") as caught:
        trainer_of(configure(reward=other, train={"epochs": 3}, output={"resume": True}))
    assert without_secrets(str(caught.value))


def test_a_checkpoint_with_an_unredacted_address_is_resumed(
    server: Server, configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    """A checkpoint may contain addresses without redaction."""
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
def test_the_error_hides_secrets_that_a_server_repeats(
    server: Server, star_train: Callable[..., int], shown: Callable[[], str], status: int
) -> None:
    server.answer = lambda body: repeats_the_request(status)
    assert star_train(reward=judge(server, retries=1)) == 1
    text = shown()
    assert "no such judge: /score?***, Authorization: Bearer ***" in text
    assert without_secrets(text)


@pytest.mark.parametrize("status", [200, 403, 500])
def test_warnings_of_skipped_samples_hide_secrets_that_a_server_repeats(
    server: Server, configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], status: int
) -> None:
    server.answer = lambda body: repeats_the_request(status)
    trainer = trainer_of(configure(reward={**judge(server, retries=0), "on_failure": "skip"}))
    with pytest.warns(RuntimeWarning, match="no such judge") as warned, pytest.raises(RewardError):
        trainer.run()
    assert all(without_secrets(str(warning.message)) for warning in warned)


class Quoting:
    """Raises an error like that of an HTTP client."""

    name = "quoting"

    def __call__(self, *_: Any) -> torch.Tensor:
        raise OSError(f"401 Client Error for url: https://me:{PASSWORD}@host/score?token={QUERY}")


@pytest.mark.parametrize("on_failure", ["stop", "skip"])
def test_secrets_in_the_address_of_a_rewards_error_are_hidden(on_failure: Any) -> None:
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
        ({"weights": {f"https://me:{PASSWORD}@host/score": 1.0}}, "without user and password"),
        ({"weights": {f"https://me:{PASSWORD}/2@host/score": 1.0}}, "without user and password"),
        ({"weights": {f"https://host:{PASSWORD}/score": 1.0}}, "without user and password"),
        ({"weights": {f"https://host/score?token=a {QUERY}": 1.0}}, "without user and password"),
        ({"weights": {f"ftp://me:{PASSWORD}@host/score": 1.0}}, "unknown reward 'ftp://***@host/score'"),
        ({"weights": {"ocr": 1.0}, "options": {f"https://host/score?token={QUERY}": {}}}, "options must be for"),
        ({"weights": {f"https://host/score?token={QUERY}": 1.0}, "options": {"ocr": {}}}, "options must be for"),
    ],
    ids=["user", "slash", "port", "blank", "scheme", "options", "weights"],
)
def test_errors_of_invalid_settings_hide_secrets(
    star_train: Callable[..., int], shown: Callable[[], str], reward: dict[str, Any], message: str
) -> None:
    assert star_train(reward=reward) == 1
    text = shown()
    assert message in text
    assert without_secrets(text)


class Chain:
    """A trainer that fails with an unexpected error whose message contains secrets."""

    def __init__(self, config: Config) -> None:
        try:
            raise OSError(f"401 Client Error for url: https://me:{PASSWORD}@host/score?token={QUERY}")
        except OSError as error:
            raise RuntimeError(f"Authorization: Bearer {BEARER}, password={NESTED!r}") from error


def test_tracebacks_of_unexpected_errors_hide_secrets(
    monkeypatch: pytest.MonkeyPatch, star_train: Callable[..., int], shown: Callable[[], str]
) -> None:
    monkeypatch.setattr("star_trainer.trainer.Trainer", Chain)
    assert star_train() == 1
    text = shown()
    assert text.count("Traceback (most recent call last)") == 2
    assert "OSError: 401 Client Error for url: https://***@host/score?***" in text
    assert "RuntimeError: Authorization: Bearer ***, password='***'" in text
    assert without_secrets(text)


def test_logged_exceptions_hide_secrets() -> None:
    try:
        raise OSError(f"https://me:{PASSWORD}@host")
    except OSError:
        record = logging.LogRecord("x", 40, __file__, 1, "token: %s", (QUERY,), sys.exc_info())
    text = RedactingFormatter().format(record)
    assert "token: ***" in text
    assert "https://***@host" in text
    assert without_secrets(text)


def test_printed_warnings_hide_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    redact_warnings()
    text = warnings.formatwarning(UserWarning(f"https://me:{PASSWORD}@host, token={QUERY}"), UserWarning, "f.py", 3)
    assert text.startswith("f.py:3: UserWarning: https://***@host")
    assert without_secrets(text)


def test_secrets_of_options_are_hidden_in_all_texts(
    keyed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = keyed()
    build(settings["weights"], options=settings["options"])
    assert redact(f"no such key: {KEY!r}, {HEADER} {NESTED}") == "no such key: '***', *** ***"


def test_errors_of_unaccepted_options_hide_secrets(keyed: Callable[..., dict[str, Any]]) -> None:
    def make(api_key: str = KEY, limit: str = "no secret") -> Keyed:
        return Keyed()

    sys.modules["keyed"].make = make  # type: ignore[attr-defined]
    sys.modules["keyed"].ready = Keyed()  # type: ignore[attr-defined]
    options = keyed()["options"]["keyed:Keyed"]
    with pytest.raises(ValueError, match=r"must fit make.*= 'no secret'.*'client'") as caught:
        build({"keyed:make": 1.0}, options={"keyed:make": options})
    with pytest.raises(ValueError, match=r"because it is an instance, got .*'max_tokens': 5") as other:
        build({"keyed:ready": 1.0}, options={"keyed:ready": options})
    assert without_secrets(f"{caught.value} {other.value}")


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
        (f"- '{ADDRESS}'", "must contain sections of settings"),
    ],
    ids=["value", "twice", "unknown", "section", "list"],
)
def test_errors_of_invalid_files_hide_secrets(
    shown: Callable[[], str], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--config", str(tmp_path / "mine.yaml")])
    said = shown()
    assert message in said
    assert without_secrets(said)


def test_errors_of_unreadable_options_hide_secrets(shown: Callable[[], str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--reward.weights", f'{{"https://me:{PASSWORD}@host/score?token={QUERY}": 1.0'])
    text = shown()
    assert "https://***@host/score?***" in text
    assert without_secrets(text)
