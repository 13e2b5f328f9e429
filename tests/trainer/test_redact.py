"""The functions that hide secrets: names of secrets, and what remains of texts, addresses and settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest

from star_trainer.redact import is_secret, redact, redacted, remember_options
from star_trainer.rewards.remote import RemoteReward


@pytest.mark.parametrize("written", [repr, json.dumps, quote, quote_plus, lambda text: quote(text, safe="")])
def test_a_secret_is_hidden_in_any_encoding(written: Callable[[str], str]) -> None:
    secret = 'p@ss "w\u00f6rd"/\\x'
    remember_options({"password": secret, "pin": {"secret": 73519462}})
    assert redact(f"x {written(secret).strip(chr(34) + chr(39))} 73519462") == "x *** ***"


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
def test_names_of_other_options(name: str) -> None:
    assert not is_secret(name)


def test_redacted_options_keep_their_structure() -> None:
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
def test_named_secrets_in_a_text_are_hidden(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


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
def test_secrets_in_an_address_are_hidden(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


def test_keys_that_become_equal_are_numbered() -> None:
    settings = {"weights": {"http://a/b?x": 1.0, "http://a/b?y": 2.0}, "list": ["http://a?b c", 3, None], "n": 4}
    expected = {"weights": {"http://a/b?***": 1.0, "http://a/b?***#2": 2.0}, "list": ["http://a?***", 3, None], "n": 4}
    assert redacted(settings) == expected
    assert redacted(expected) == expected


def test_values_in_the_query_of_an_address_are_hidden_in_any_encoding() -> None:
    reward = RemoteReward("http://host/score?model=clip&token=secret%2Fsecret")
    hidden = "***"
    for text in ("model=clip&token=secret%2Fsecret", "secret%2Fsecret", "secret/secret"):
        assert reward._hide(text) == hidden
    assert reward._hide("no model clip") == "no model clip"  # short values are not secrets
