"""The small Stable Diffusion 3: training from scratch by its command, and the shipped model against its card."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from matplotlib.figure import Figure

from star_trainer.config import Config
from star_trainer.policy import SHIPPED, load_pipeline
from star_trainer.scenes import TASKS, vocabulary
from star_trainer.small import SMALL, evaluate
from star_trainer.small import command as small_command
from star_trainer.small.card import model_card
from star_trainer.small.command import main
from star_trainer.small.evaluate import correlation, generate, held_out, localisation, scores
from star_trainer.small.pipeline import build_tokenizer
from star_trainer.trainer import Trainer

TINY = {
    "heads": 1, "blocks": 2, "text_width": 32, "vae_steps": 2, "vae_batch": 4, "pool": 8, "steps": 3, "batch": 4,
    "warmup": 1, "sampling_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def shipped() -> Any:
    return load_pipeline("small", torch.float32)


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return json.loads((SHIPPED / "metrics.json").read_text())


def test_the_command_makes_a_reproducible_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [word for name, value in TINY.items() for word in (f"--recipe.{name}", str(value))]
    for folder in ("a", "b"):
        assert main(["--out", str(tmp_path / folder), "--device", "cpu", "--evaluate", "2", *options]) == 0
        # The second run is only compared in its weights.
        monkeypatch.setattr(evaluate, "localisation", lambda *arguments, **options: torch.zeros(2, 2))
        monkeypatch.setattr(small_command, "draw_samples", lambda *arguments: Figure())
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "a", text_encoder_3=None, tokenizer_3=None)
    image = pipeline("a red circle", num_inference_steps=2, max_sequence_length=1, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
    written = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*.safetensors"))]
    assert len(written) == 4  # transformer, autoencoder, two text encoders
    for path in written:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    for name in ("README.md", "metrics.json", "samples.png", "localisation.png"):
        assert (tmp_path / "a" / name).stat().st_size > 100
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert found["command"].startswith("star-train-small --size small --recipe.")
    assert set(found["scenes"]) == set(TASKS)


def test_every_word_of_the_scenes_is_one_token() -> None:
    first, second = build_tokenizer(16), build_tokenizer(16)
    assert first.get_vocab() == second.get_vocab()
    for word in vocabulary():
        assert len(first.tokenize(word)) == 1, word
    assert "".join(first.tokenize("zoo")) == "zoo</w>"


def test_the_shipped_model_is_small_and_contains_no_pickles() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png", ".txt"}


def test_the_card_contains_the_metrics(metrics: dict[str, Any]) -> None:
    assert (SHIPPED / "README.md").read_text() == model_card(metrics)
    assert metrics["command"] == "star-train-small --size small"
    assert metrics["recipe"] == json.loads(json.dumps(SMALL.__dict__))
    assert metrics["training_minutes"] < 40


def test_the_shipped_model_has_the_metrics_of_its_card(shipped: Any, metrics: dict[str, Any]) -> None:
    """For 32 of the held-out prompts; 0.2 is 3.5 standard errors if the standard deviation of scores is 0.32."""
    found = scores(shipped, count=32, steps=SMALL.sampling_steps, guidance=SMALL.guidance)
    for task in TASKS:
        assert abs(found[task]["graded"] - metrics["scenes"][task]["graded"]) < 0.2


def test_attention_maps_of_the_shipped_model_localise_objects(shipped: Any, metrics: dict[str, Any]) -> None:
    table = localisation(shipped, count=24, steps=SMALL.sampling_steps, guidance=SMALL.guidance)
    stored = torch.tensor(metrics["localisation"])
    assert table.shape == stored.shape == (SMALL.blocks, SMALL.sampling_steps)
    assert stored.max() > 0.5
    assert (table - stored).abs().max() < 0.25


def test_a_word_changes_the_image(shipped: Any) -> None:
    images = generate(shipped, ["a red circle", "a blue circle", "a red circle"], steps=4, guidance=2.5)
    assert images.shape == (3, 3, 32, 32)
    again = generate(shipped, ["a red circle"], steps=4, guidance=2.5)
    torch.testing.assert_close(again[0], images[0], rtol=0, atol=1e-4)
    same_noise = [generate(shipped, [prompt], steps=4, guidance=2.5) for prompt in ("a red circle", "a blue circle")]
    assert (same_noise[0] - same_noise[1]).abs().mean() > 0.01


def test_held_out_prompts_are_the_same_each_time() -> None:
    assert [s.prompt for s in held_out("text", 5)] == [s.prompt for s in held_out("text", 5)]


def test_correlation_is_pearsons() -> None:
    a, b = torch.rand(2, 3, 50)
    expected = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)])
    torch.testing.assert_close(correlation(a, b), expected)


def test_a_local_model_does_not_use_the_network(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    trainer_of(configure(evaluation={"every": 1})).run()


def test_small_is_the_default_model() -> None:
    assert Config().model.path == "small"
