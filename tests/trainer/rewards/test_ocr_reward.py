"""Text rendering: the edit distance, the target text, and reading text from images."""

from __future__ import annotations

import random
import sys
import types
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from star_trainer.rewards import Reward, build
from star_trainer.rewards.ocr import edit_distance, target_text, text_score

PROMPTS_FILE = Path(__file__).parents[4] / "shared" / "data" / "ocr_prompts.txt"


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance_counts_insertions_deletions_and_substitutions(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_edit_distance_equals_the_recursive_reference() -> None:
    @lru_cache(None)
    def defined(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(defined(a[1:], b) + 1, defined(a, b[1:]) + 1, defined(a[1:], b[1:]) + (a[0] != b[0]))

    chance = random.Random(0)
    for _ in range(300):
        a, b = ("".join(chance.choices("abc", k=chance.randrange(7))) for _ in range(2))
        assert edit_distance(a, b) == defined(a, b)


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("HELLO", "HELLO", 1.0),
        ("hello world", "Hello World", 1.0),
        ("he llo", "hel lo", 1.0),
        ("the sign says hello today", "hello", 1.0),
        ("HELPO", "HELLO", 0.8),
        ("HELL", "HELLO", 0.8),
        ("", "HELLO", 0.0),
        ("XXXXXXXXXXXXXXXXXXXXXX", "HELLO", 0.0),
        ("HELLOHALLO", "HALLI", 0.0),
    ],
)
def test_the_score_is_flow_grpos(read: str, wanted: str, score: float) -> None:
    assert text_score(read, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("read", "wanted", "flow_grpo"),
    [
        ("CAFÉ", "cafe\u0301", 0.6),
        ("\uff2f\uff30\uff25\uff2e", "open", 0.0),
        ("Don't", "Don\u2019t", 0.8),
        ('"WI-FI"', "“Wi\u2013Fi”", 1 - 3 / 7),
        ("open\tnow", "Open Now", 1 - 1 / 7),
        ("STRASSE", "Straße", 1 - 2 / 6),
    ],
)
def test_texts_that_look_alike_are_equal_with_normalisation(read: str, wanted: str, flow_grpo: float) -> None:
    assert text_score(read, wanted) == text_score(wanted, read) == 1.0
    assert text_score(read, wanted, normalize=False) == pytest.approx(flow_grpo)


def test_an_invisible_target_text_is_refused() -> None:
    for normalize, wanted in ((True, "\u200b \t"), (False, " ")):
        with pytest.raises(ValueError, match="target must contain a visible character"):
            text_score("x", wanted, normalize=normalize)


def test_the_target_is_from_the_metadata_or_the_first_quotation() -> None:
    assert target_text('a sign that says "STOP"', {"text": "GO"}) == "GO"
    assert target_text('a sign that says "STOP" and "GO"', {}) == "STOP"
    assert target_text("a sign that says \u201cStop here\u201d", {}) == "Stop here"
    for prompt in ("a sign ''Hello''", r"a sign \"Hello\"", "a sign ``Hello''"):
        assert target_text(prompt, {}) == "Hello"


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [("a cat", {}), ('"HI"', {"text": "  "}), ('"HI"', {"text": "\u200b"}), ('"HI"', {"text": 3})],
)
def test_a_prompt_without_a_target_text_is_refused(prompt: str, metadata: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="ocr requires"):
        target_text(prompt, metadata)


@pytest.mark.skipif(not PROMPTS_FILE.exists(), reason="the prompts are not beside the project")
def test_targets_of_flow_grpos_prompts_equal_flow_grpos() -> None:
    prompts = PROMPTS_FILE.read_text().splitlines()
    assert len(prompts) > 1000
    for prompt in prompts:
        assert target_text(prompt, {}).split() == prompt.split('"')[1].split()


def drawn(text: str, *, size: int = 512, color: str = "black", background: str = "white") -> Tensor:
    """An image of the text, float32 ``[3, size, size]``."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (size, size), background)
    ImageDraw.Draw(image).text(
        (size // 2, size // 2), text, fill=color, font=ImageFont.load_default(size // 8), anchor="mm", align="center"
    )
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def reward() -> Reward:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return build({"ocr": 1.0}, options={"ocr": {"threads": 1}}).rewards["ocr"]


@pytest.mark.parametrize("size", [256, 512])
def test_text_in_an_image_is_read(reward: Reward, size: int) -> None:
    texts = ["HELLO", "Open Now", "Spring 2024"]
    images = torch.stack([drawn(text, size=size) for text in texts])
    scores = reward(images, [""] * 3, [{"text": text} for text in texts])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0] * 3


def test_the_target_text_scores_above_a_similar_one_and_that_above_none(reward: Reward) -> None:
    images = torch.stack([drawn("WELCOME"), drawn("WELFARE"), drawn("TAXI"), drawn("")])
    right, similar, other, none = reward(images, ['a door with "WELCOME" on it'] * 4, [{}] * 4).tolist()
    assert right == 1.0
    assert right > similar > other
    assert none == 0.0


def test_lines_are_read_from_top_to_bottom(reward: Reward) -> None:
    assert reward(drawn("GOOD\nMORNING")[None], [""], [{"text": "Good morning"}]).tolist() == [1.0]


def test_coloured_text_is_read(reward: Reward) -> None:
    images = torch.stack([drawn("HELLO", color="yellow", background="navy"), drawn("HELLO", color="red")])
    assert reward(images, [""] * 2, [{"text": "hello"}] * 2).tolist() == [1.0, 1.0]


def test_the_comparison_is_an_option_of_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rapidocr", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(RapidOCR=lambda params: None))
    scores = []
    for options in ({}, {"normalize": False}):
        reward = build({"ocr": 1.0}, options={"ocr": options}).rewards["ocr"]
        monkeypatch.setattr(reward, "read", lambda image: "CAFÉ")
        scores += reward(torch.zeros(1, 3, 8, 8), [""], [{"text": "cafe\u0301"}]).tolist()
    assert scores == pytest.approx([1.0, 0.6])
    with pytest.raises(ValueError, match="normalize must be true or false, got 'no'"):
        build({"ocr": 1.0}, options={"ocr": {"normalize": "no"}})


def test_rapidocr_receives_bgr_pixels(reward: Reward, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Nothing:
        txts = None

    monkeypatch.setattr(reward, "_reader", lambda pixels: seen.append(pixels) or Nothing())
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8)
    assert reward(red[None], [""], [{"text": "x"}]).tolist() == [0.0]
    assert seen[0][0, 0].tolist() == [0, 0, 255]
