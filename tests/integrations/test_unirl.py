"""UniRL's algorithms with weights: its own numbers without them, and the weighted log-ratio with them."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import unirl_contract as contract
from flow_grpo_formulas import close
from small_pipelines import PROMPTS, sd3_pipeline
from unirl_contract import FlowGRPO, Part, Stage, rollout, unirl

from star_kernels import allocate
from star_kernels.capture import capture_maps
from star_kernels.integrations import unirl as ours
from star_kernels.prompts import regions_of, select_tokens

__all__ = ["unirl"]

ADVANTAGES = torch.tensor([9.0, -0.7])  # beyond the usual clip of 5
PARAMS = SimpleNamespace(eta=0.6)
PIPELINE = sd3_pipeline()


def select(part: Any) -> Any:
    return select_tokens(ours.prompts_of(part), regions_of(PIPELINE))[0]


def trained(part: Part, algorithm: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Gradients and metrics of two updates, sample by sample, as UniRL's train stack runs them."""
    if algorithm.recomputes_anchor:
        anchors = []
        for i in range(part.batch_size):
            rows = part.slice(i, i + 1)
            algorithm.prepare_segment(conditions=rows.conditions, segment=rows.segment)
            anchors.append(rows.segment.sde_logp)
        part.segment.sde_logp = torch.cat(anchors)
    else:
        algorithm.prepare_segment(conditions=part.conditions, segment=part.segment)
    part = algorithm.prepare_part(part)
    parameters = list(algorithm.stage.transformer.parameters())
    gradients, metrics = [], []
    for _ in range(2):
        for i in range(part.batch_size):
            rows = part.slice(i, i + 1)
            metrics.append(
                algorithm.compute_loss_and_backward(
                    conditions=rows.conditions, segment=rows.segment, advantages=ADVANTAGES[i : i + 1],
                    training_progress=0.0, loss_scale=0.5,
                ).metrics
            )  # fmt: skip
        for p in parameters:
            if p.grad is not None:
                gradients.append(p.grad)
                p.data -= 1e-3 * p.norm() / p.grad.norm().clamp(min=1e-12) * p.grad
                p.grad = None
    return gradients, metrics


def run(kind: type[Any], sampler: str, **options: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    stage = Stage(sampler)
    part = rollout(stage)
    return trained(part, kind(stage=stage, params=PARAMS, clip_range=2e-3, old_logp_source="replay", **options))


@pytest.mark.parametrize("sampler", ["flow", "cps"])
def test_without_select_the_numbers_are_unirls_and_uniform_weights_change_little(unirl: None, sampler: str) -> None:
    gradients, metrics = run(FlowGRPO, sampler)
    same, found = run(ours.StarFlowGRPO, sampler)
    assert all(torch.equal(a, b) for a, b in zip(same, gradients, strict=True))
    for theirs, all_of_them in zip(metrics, found, strict=True):
        assert theirs.items() <= all_of_them.items()
        assert {f"log_prob_diff/step_{i}/max" for i in contract.SDE_STEPS} < all_of_them.keys()
    assert metrics[2]["ratio_mean"] != 1
    even, _ = run(ours.StarFlowGRPO, sampler, select=select, strength=0.0)
    close(*(torch.cat([g.flatten() for g in found]) for found in (even, gradients)), 1e-5)


def test_the_log_ratio_has_the_weights_of_the_maps_before_the_updates(unirl: None) -> None:
    stage = Stage()
    part = rollout(stage)
    algorithm = ours.StarFlowGRPO(stage=stage, params=PARAMS, old_logp_source="replay", select=select)
    assert algorithm.recomputes_anchor is False
    algorithm.prepare_segment(conditions=part.conditions, segment=part.segment)
    before = part.segment.sde_logp
    part = algorithm.prepare_part(part)
    close(part.segment.sde_logp, before)
    with torch.no_grad():
        old = stage.replay(part.conditions, segment=part.segment, params=PARAMS).prev_sample_means
        with capture_maps(stage.transformer, select(part)) as maps:
            stage.mean(part.conditions, part.segment.latents_at(3), 3, PARAMS.eta)
        for parameter in stage.transformer.parameters():
            parameter += 0.02 * parameter.abs().mean()
    weights = allocate(maps.value[:, 0], layout="bhw")
    close(part.segment.loss_mask[:, 1], weights, 1e-5)

    replay = ours._Replay(stage, algorithm._check, weighted=True)
    steps = contract.SDE_STEPS
    found = replay.replay(part.conditions, segment=part.segment, params=PARAMS, step_indices=steps)
    new = found.prev_sample_means[:, 1]
    std, drawn = stage.std(3, PARAMS.eta), part.segment.latents_at(4)
    dense = [torch.distributions.Normal(m, std).log_prob(drawn).mean(dim=1) for m in (new, old[:, 1])]
    change = dense[0] - dense[1]
    wide = weights.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    expected = (wide * change).flatten(1).mean(dim=1)
    close(found.log_probs[:, 1] - part.segment.sde_logp[:, 1], expected, 1e-4)
    assert float((expected - change.flatten(1).mean(dim=1)).detach().abs().max()) > 1e-4
    assert found.log_probs.requires_grad
    close(torch.tensor(replay.metrics["log_prob_diff/step_3/max"]), change.abs().amax(), 1e-4)


@pytest.mark.parametrize("sampler", ["flow", "cps"])
def test_the_ratio_of_a_model_that_has_not_changed_is_one(unirl: None, sampler: str) -> None:
    _, metrics = run(ours.StarFlowGRPO, sampler, select=select)
    for first in metrics[:2]:
        assert first["ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert first["log_prob_diff/step_1/max"] < 1e-4
        assert first["rollout_log_prob_diff/step_1/max"] < 1e-4
    assert metrics[2]["ratio_mean"] != pytest.approx(1, abs=1e-6)


def test_another_sampler_is_an_error_in_the_first_update(unirl: None) -> None:
    stage = Stage()
    part = rollout(stage)
    algorithm = ours.StarFlowGRPO(stage=stage, params=PARAMS, old_logp_source="replay", select=select)
    replay = stage.replay

    def other(*arguments: Any, **options: Any) -> Any:
        stage.strategy.canonical_name = "flow"
        result = replay(*arguments, **options)
        stage.strategy.canonical_name = "cps"
        return result

    stage.replay = other  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"sde_type must be the sampler of stage.replay \(cps\)"):
        trained(part, algorithm)
    stage.replay = replay  # type: ignore[method-assign]
    stage.strategy.canonical_name = "heun"
    with pytest.raises(ValueError, match=r"stage.strategy must be one of flow, dance, cps for weights, got 'heun'"):
        algorithm.compute_loss_and_backward(
            conditions=part.conditions, segment=part.segment, advantages=ADVANTAGES, training_progress=0, loss_scale=1
        )


def test_settings_that_do_not_fit_weights_are_errors(unirl: None) -> None:
    stage = Stage()
    arguments = {"stage": stage, "params": PARAMS, "select": select}
    with pytest.raises(ValueError, match=r"old_logp_source must be 'replay' with weights, .* got 'rollout'"):
        ours.StarFlowGRPO(**arguments)
    stage.batch_replay_steps = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="batch_replay_steps must be False with weights"):
        ours.StarFlowGRPO(old_logp_source="replay", **arguments)
    stage.batch_replay_steps = False  # type: ignore[attr-defined]
    part = rollout(stage)
    part.segment.loss_mask = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"segment.loss_mask must be None"):
        ours.StarFlowGRPO(old_logp_source="replay", **arguments).prepare_part(part)
    part = rollout(stage)
    part.metadata[1] = {}
    with pytest.raises(KeyError, match="the samples need metadata with"):
        ours.StarFlowGRPO(old_logp_source="replay", **arguments).prepare_part(part)
    part = rollout(stage)
    with pytest.raises(RuntimeError, match="the train stack must call prepare_part"):
        ours.StarFlowGRPO(old_logp_source="replay", **arguments).compute_loss_and_backward(
            conditions=part.conditions, segment=part.segment, advantages=ADVANTAGES, training_progress=0, loss_scale=1
        )


def test_a_missing_or_old_unirl_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unirl", None)
    vars(ours).pop("StarFlowDPPO", None)
    with pytest.raises(ImportError, match=r"StarFlowDPPO requires UniRL \(unirl.algorithms.flowdppo\)"):
        _ = ours.StarFlowDPPO
    with pytest.raises(AttributeError, match="has no attribute 'StarGRPO'"):
        _ = ours.StarGRPO
    with pytest.raises(TypeError, match=r"algorithm must be of UniRL 0.2.0 or later"):
        ours.star(object)


def test_the_guide_selects_the_prompts_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "unirl.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    statements = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.stmt)]
    assert len(statements) <= 10
    import diffusers

    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: PIPELINE)
    names: dict[str, Any] = {}
    exec(example, names)
    part = SimpleNamespace(metadata=[{"prompt": prompt} for prompt in PROMPTS], batch_size=len(PROMPTS))
    found = names["select"](part)
    expected = select_tokens(PROMPTS, regions_of(PIPELINE, max_sequence_length=256))[0]
    assert torch.equal(found.index, expected.index)
