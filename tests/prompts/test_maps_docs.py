"""The examples in docs/maps.md, run unchanged on the small pipeline of the tests of the command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from test_maps_command import pipeline

__all__ = ["pipeline"]  # the fixture

PAGE = Path(__file__).resolve().parents[2] / "docs" / "maps.md"


def test_the_examples_run(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first_use, heat, guidance, statistics = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(first_use, str(PAGE), "exec"), {})
    assert (tmp_path / "phrases.png").stat().st_size > 1000
    names: dict[str, Any] = {"pipeline": pipeline}
    exec(compile(heat, str(PAGE), "exec"), names)
    assert names["heat"].shape == (2, 16, 16)
    assert (tmp_path / "heat.png").stat().st_size > 1000

    embeddings = pipeline.encode_prompt(names["prompt"], None, None, do_classifier_free_guidance=False)
    before = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    names |= {"latents": before, "prompt_embeds": embeddings[0].detach(), "pooled": embeddings[2].detach()}
    names["timestep"] = torch.tensor([900.0])
    exec(compile(guidance, str(PAGE), "exec"), names)
    first = float(names["neglected"].detach())
    names["latents"] = names["latents"] - 500 * names["gradient"]  # random weights give small attention probabilities
    exec(compile(guidance, str(PAGE), "exec"), names)
    assert float(names["neglected"].detach()) < first

    exec(compile(statistics, str(PAGE), "exec"), names)
    found = names["found"]
    assert [tuple(t.shape) for t in (found.maps, found.token_entropy, found.key_entropy, found.key_sums)] == [
        (1, 2, 256), (1, 256), (1, 256), (1, 320)
    ]  # fmt: skip
