"""The examples in docs/maps.md, run unchanged on the small pipeline of the tests of the command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from test_maps_command import pipeline

from star_kernels.capture import live_captures

__all__ = ["pipeline"]  # the fixture

PAGE = Path(__file__).resolve().parents[2] / "docs" / "maps.md"


@pytest.fixture
def flux(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a trainer of FLUX has, for two images of 8 x 4 patches."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "integrations"))
    from small_pipelines import flux_pipeline

    pipeline = flux_pipeline()
    ids = pipeline._prepare_latent_image_ids(2, 8, 4, "cpu", torch.float32)
    packed, target = torch.randn(2, 2, 32, 16, generator=torch.Generator().manual_seed(0))
    return {
        "pipeline": pipeline,
        "transformer": pipeline.transformer,
        "prompts": ["a red bench", "a blue teapot on a red bench"],
        "packed_noisy_model_input": packed,
        "packed_target": target,
        "timesteps": torch.tensor([500.0, 900.0]),
        "guidance": None,
        "pooled_prompt_embeds": torch.randn(2, 16),
        "prompt_embeds": torch.randn(2, 512, 32),
        "text_ids": torch.zeros(512, 3),
        "latent_image_ids": ids,
        "object_mask": torch.arange(32).view(1, 1, 8, 4).expand(2, 1, 8, 4) < 16,
    }


def test_the_examples_run(pipeline: Any, flux: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first_use, heat, trainer, guidance, statistics = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(first_use, str(PAGE), "exec"), {})
    assert (tmp_path / "phrases.png").stat().st_size > 1000
    names: dict[str, Any] = {"pipeline": pipeline}
    exec(compile(heat, str(PAGE), "exec"), names)
    assert names["heat"].shape == (2, 16, 16)
    assert (tmp_path / "heat.png").stat().st_size > 1000

    exec(compile(trainer, str(PAGE), "exec"), flux)
    gradients = [parameter.grad for parameter in flux["transformer"].parameters() if parameter.requires_grad]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert not live_captures()

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
