"""The Python blocks of README and docs run. The blocks of a page run in order and share a namespace."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pages import PAGES, ROOT, blocks, name

# Pages whose examples have other tests, which also check the results.
ELSEWHERE = {
    "docs/adding-a-model.md": "tests/capture/test_guide.py",
    "docs/flow-factory.md": "tests/integrations/test_flow_factory.py",
    "docs/flow-grpo.md": "tests/integrations/test_flow_grpo_guide.py",
    "docs/maps.md": "tests/prompts/test_maps_docs.py",
    "docs/verl-omni.md": "tests/integrations/test_verl_omni_guide.py",
}
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if name(page) not in ELSEWHERE], ids=name)
def test_the_examples_of_a_page_run(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = PREPARED[name(page)](request, monkeypatch) if name(page) in PREPARED else {}
    for block in blocks(page, "python"):
        exec(compile(with_arguments(block), str(page), "exec"), names)


@pytest.mark.parametrize("page", ELSEWHERE)
def test_the_other_pages_have_a_test_that_runs_their_blocks(page: str) -> None:
    test = (ROOT / ELSEWHERE[page]).read_text()
    assert Path(page).name in test
    assert "exec(" in test
    assert ROOT / page in WITH_PYTHON


def with_arguments(block: str) -> str:
    """Replaces ``...`` in a call of README by the arguments that it omits."""
    return re.sub(r"\(\.\.\.\)", "(**inputs)", re.sub(r", \.\.\.\)", ", **text)", block))


def _readme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stable Diffusion 3 at 512x512: 64x64 latents, 1024 image tokens."""
    pytest.importorskip("diffusers")
    from small_pipelines import PROMPTS, embeddings, sd3_pipeline

    pipeline = sd3_pipeline()
    sizes = {**pipeline.transformer.config, "sample_size": 64, "pos_embed_max_size": 32}
    transformer = type(pipeline.transformer).from_config(sizes)
    latents = torch.randn(len(PROMPTS), 4, 64, 64)
    (tokens, pooled), (empty, empty_pooled) = embeddings(len(PROMPTS), 1), embeddings(len(PROMPTS), 2)
    text = {"encoder_hidden_states": tokens, "pooled_projections": pooled, "timestep": torch.full((2,), 900.0)}
    doubled = {
        "hidden_states": torch.cat([latents] * 2),
        "encoder_hidden_states": torch.cat([empty, tokens]),
        "pooled_projections": torch.cat([empty_pooled, pooled]),
        "timestep": torch.full((4,), 900.0),
    }

    def guided(output: Any) -> torch.Tensor:
        unconditional, conditional = output[0].chunk(2)
        return unconditional + 4.5 * (conditional - unconditional)

    return {
        "pipeline": pipeline,
        "transformer": transformer,
        "prompts": PROMPTS,
        "device": torch.device("cpu"),
        "inputs": doubled,
        "text": text,
        "guided": guided,
        "latents": latents,
        "sigma": 0.9,
        "sigma_next": 0.8,
        "sigmas": [1.0, 0.95, 0.9],
        "generator": torch.Generator().manual_seed(0),
        "advantages": torch.tensor([1.3, -0.8]),
    }


def _prompts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for the parser and the language model that the page calls."""
    pytest.importorskip("diffusers")
    from small_pipelines import PROMPTS, flux_pipeline

    def parse(prompt: str) -> Any:
        found = re.finditer(r"red bench|blue teapot|neon sign", prompt)
        return SimpleNamespace(noun_chunks=[SimpleNamespace(start_char=m.start(), end_char=m.end()) for m in found])

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda model: parse))
    return {
        "pipeline": flux_pipeline(),  # text first: positions do not depend on the image's size
        "prompts": PROMPTS,
        "height": 128,
        "width": 128,
        "device": torch.device("cpu"),
        "ask": lambda question: "red bench\nneon sign\na green dog\n",
    }


def _recipes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "recipes"))
    pipeline = request.getfixturevalue("small_pipeline")
    trained = type(pipeline.transformer).from_config(pipeline.transformer.config).eval()
    return {"pipeline": pipeline, "trained": trained}


def _unirl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small pipeline in place of the one that the page loads."""
    diffusers = pytest.importorskip("diffusers")
    from small_pipelines import sd3_pipeline

    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: sd3_pipeline())
    return {}


def _first_hour(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The small pipeline, and one task in GenEval's format, in the test's folder."""
    tasks = Path("geneval", "prompts", "evaluation_metadata.jsonl")
    tasks.parent.mkdir(parents=True)
    tasks.write_text('{"tag": "single_object", "prompt": "a red circle"}\n')
    return {"pipeline": request.getfixturevalue("small_pipeline"), "resolution": None}


PREPARED = {
    "README.md": _readme,
    "docs/first-hour.md": _first_hour,
    "docs/prompts.md": _prompts,
    "docs/recipes.md": _recipes,
    "docs/unirl.md": _unirl,
}
