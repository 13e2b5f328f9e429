"""The examples in docs/verl-omni.md and examples/verl-omni run unchanged, with stand-ins for the trainers."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from flow_grpo_formulas import rollout
from small_pipelines import sd3_pipeline
from verl_omni_contract import World, verl_omni

from star_kernels.integrations.verl_omni import StarLoss
from star_kernels.prompts import select_tokens
from star_kernels.prompts.regions import sd3_regions
from tools.clients.verl_omni_interface import COMMIT

__all__ = ["verl_omni"]  # the fixture

ROOT = Path(__file__).resolve().parents[2]
PAGE, EXAMPLE = ROOT / "docs" / "verl-omni.md", ROOT / "examples" / "verl-omni"
MEANS, PLUGIN, SELECT = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run(block: str, **names: Any) -> dict[str, Any]:
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_loss_of_means_trains() -> None:
    problem = rollout("flux")
    new = problem.written(problem.new_v)
    mean = new.mean.requires_grad_()
    names = run(
        MEANS, prev_sample_mean=mean, prev_sample=problem.old.prev_sample, std_dev_t=new.std_dev_t,
        sqrt_dt=new.sqrt_dt, advantages=problem.advantages, old_prev_sample_mean=problem.old.mean,
    )  # fmt: skip
    assert bool(names["loss"].isfinite())
    assert bool(mean.grad.any())


def test_the_plugin_registers(verl_omni: World) -> None:
    run(PLUGIN)
    assert all(isinstance(loss, StarLoss) for loss in verl_omni.registry.values())


@pytest.fixture
def tokenizers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The text regions of SD3's pipeline; the example's AutoTokenizer returns its tokenizers."""
    pipeline = sd3_pipeline()
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")

    def from_pretrained(model: str, *, subfolder: str) -> Any:
        return getattr(pipeline, subfolder)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    return sd3_regions(*(getattr(pipeline, name) for name in names))


@pytest.mark.parametrize("source", ["guide", "example"])
def test_select_finds_the_quoted_text(verl_omni: World, tokenizers: list[Any], source: str) -> None:
    code = SELECT if source == "guide" else (EXAMPLE / "star_plugin.py").read_text()
    select = run(code, model="a model")["select"]
    prompt = 'a neon sign that reads "Fresh Broth Daily"'
    chat = [{"role": "user", "content": prompt}]
    batch = {"all_latents": torch.zeros(2, 3, 4, 16, 12), "raw_prompt": [chat, chat]}
    expected, _ = select_tokens([prompt] * 2, tokenizers)
    found = select(batch)
    assert torch.equal(found.index, expected.index)
    assert verl_omni.engine.star_feed.select is select


def test_the_guide_needs_at_most_ten_statements() -> None:
    statements = [node for node in ast.walk(ast.parse(SELECT)) if isinstance(node, ast.stmt)]
    assert len(statements) <= 10
    assert COMMIT[:8] in PAGE.read_text()


def test_the_examples_script_sets_what_its_configuration_reads() -> None:
    text, script = (EXAMPLE / "star.yaml").read_text(), EXAMPLE / "run.sh"
    read = set(re.findall(r"oc\.env:(\w+)", text))
    assert read == set(re.findall(r"^export (\w+)=", script.read_text(), re.MULTILINE))
    subprocess.run(["bash", "-n", str(script)], check=True)
    settings = yaml.safe_load(text)
    actor = settings["actor_rollout_ref"]
    assert actor["model"]["attn_backend"] == "native"
    assert actor["rollout"]["rollout_attn_backend"] == "TORCH_SDPA"
    assert actor["actor"]["fsdp_config"]["ulysses_sequence_parallel_size"] == 1
    assert settings["algorithm"]["rollout_correction"]["bypass_mode"] is False
    assert (EXAMPLE / f"{actor['model']['external_lib']}.py").is_file()
