"""The examples in docs/verl-omni.md run unchanged, with stand-ins for the trainers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from flow_grpo_formulas import Rollout, close, rollout
from small_pipelines import PROMPTS, embeddings, flux_pipeline
from verl_omni_contract import World, verl_omni

from star_kernels import allocate
from star_kernels.capture import capture_maps
from star_kernels.integrations.verl_omni import StarLoss
from star_kernels.prompts import regions_of, select_tokens

__all__ = ["verl_omni"]  # the fixture

PAGE = Path(__file__).resolve().parents[2] / "docs" / "verl-omni.md"
MEANS, PLUGIN, SELECT, FLOW_FACTORY = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


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


def test_the_plugin_registers_and_select_turns_maps_on(verl_omni: World) -> None:
    names = run(PLUGIN)
    assert isinstance(verl_omni.registry["flow_grpo"], StarLoss)
    assert verl_omni.engine.star_select is None
    regions = regions_of(flux_pipeline())
    names = run(SELECT, register=names["register"], prompts_of=lambda micro_batch: PROMPTS, regions=regions)
    selection = verl_omni.engine.star_select({"all_latents": torch.zeros(2, 3, 4)})
    assert torch.equal(selection.index, names["select"]({"all_latents": torch.zeros(2, 3, 4)}).index)


class GRPOGuardTrainer:
    """The parts of Flow-Factory's trainer that the subclass uses."""

    def __init__(self, pipeline: Any, problem: Rollout, inputs: dict[str, Any]) -> None:
        self.adapter = SimpleNamespace(pipeline=pipeline, trajectory_component_order=("image",))
        self.accelerator = SimpleNamespace(device=torch.device("cpu"))
        self.problem, self.inputs = problem, inputs

    def _replay_forward(self, batch: Any, replay: Any, return_fields: Any) -> Any:
        v = self.adapter.pipeline.transformer(hidden_states=replay.state.components["image"], **self.inputs)[0]
        new = self.problem.written(v)
        return SimpleNamespace(
            next_state_mean=SimpleNamespace(components={"image": new.mean}),
            std_dev_t={"image": new.std_dev_t},
            dt={"image": -new.sqrt_dt.square()},
            log_prob=new.log_prob,
        )

    def _require_output_state(self, output: Any, field: str, source: str) -> Any:
        return getattr(output, field)

    def optimize(self, batch: Any, replay: Any, old_state_mean: Any) -> tuple[torch.Tensor, Any]:
        output = self._replay_forward(batch, replay, ("log_prob",))
        return self._guard_ratio(output, replay, old_state_mean, 0), output  # type: ignore[attr-defined]


def test_the_flow_factory_subclass_returns_the_weighted_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flow_factory", "flow_factory.trainers", "flow_factory.trainers.rl", "flow_factory.trainers.rl.grpo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flow_factory.trainers.rl.grpo"].GRPOGuardTrainer = GRPOGuardTrainer  # type: ignore[attr-defined]
    trainer_class = run(FLOW_FACTORY)["StarGRPOTrainer"]

    problem = rollout("flux", steps=(2, 5))
    pipeline = flux_pipeline(channels=64)
    text, pooled = embeddings(2, 1)
    ids = torch.zeros(256, 3)
    ids[:, 1], ids[:, 2] = torch.arange(256) // 16, torch.arange(256) % 16
    inputs = {
        "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": torch.full((2,), 0.5),
        "img_ids": ids, "txt_ids": torch.zeros(text.shape[1], 3),
    }  # fmt: skip
    trainer = trainer_class(pipeline=pipeline, problem=problem, inputs=inputs)
    replay = SimpleNamespace(
        state=SimpleNamespace(components={"image": problem.sample}),
        next_state=SimpleNamespace(components={"image": problem.old.prev_sample}),
    )
    old = SimpleNamespace(components={"image": problem.old.mean})
    ratio, output = trainer.optimize({"prompt": PROMPTS}, replay, old)
    trainer.maps.remove()

    selection, _ = select_tokens(PROMPTS, regions_of(pipeline))
    with capture_maps(pipeline.transformer, selection, cfg=None) as maps, torch.no_grad():
        pipeline.transformer(hidden_states=problem.sample, **inputs)
    weights = allocate(maps.value[:, 0], layout="bhw").flatten(1)
    change = (output.log_prob - problem.old.log_prob).mean(dim=-1)
    close(ratio, (weights * change).mean(dim=1).exp(), 1e-5)
    assert float((ratio - change.mean(dim=1).exp()).detach().abs().max()) > 2e-4
    ratio.sum().backward()
    assert bool(pipeline.transformer.proj_out.weight.grad.any())
