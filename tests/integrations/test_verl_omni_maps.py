"""Maps in VeRL-Omni's engine: which pass they are of, what they require, and the prompts that they are selected for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import FluxTransformer2DModel
from flow_grpo_formulas import BATCH, close, rollout
from verl_omni_contract import World, actor_config, dispatch, micro_batch, verl_omni

from star_kernels import TokenSelection
from star_kernels.capture import capture_maps
from star_kernels.integrations.layout import map_layout
from star_kernels.integrations.record import record_maps
from star_kernels.integrations.verl_omni import Clipped, prompts_of, register

__all__ = ["verl_omni"]  # the fixture

CLIP = 0.05


class GuidedTransformer(torch.nn.Module):
    """Guided velocities from a transformer that runs twice, with different texts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        ids = torch.zeros(256, 3)
        ids[:, 1], ids[:, 2] = torch.arange(256) // 16, torch.arange(256) % 16
        self.inputs = {
            "pooled_projections": torch.randn(BATCH, 16),
            "timestep": torch.full((BATCH,), 0.5),
            "img_ids": ids,
            "txt_ids": torch.zeros(7, 3),
        }
        self.texts = torch.randn(2, BATCH, 7, 32)

    def forward(self, latents: Tensor) -> Tensor:
        positive, negative = (
            self.module(hidden_states=latents, encoder_hidden_states=text, **self.inputs, return_dict=False)[0]
            for text in self.texts
        )
        return negative + 2.0 * (positive - negative)


def test_maps_of_the_conditional_pass_are_passed_to_the_loss(verl_omni: World, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = TokenSelection.from_positions([[1, 2]] * BATCH)
    seen: list[dict[str, Tensor]] = []
    original = Clipped.loss_with_weights

    def recording(self: Any, settings: Any, model_output: Any, data: Any, weights: Any) -> Any:
        seen.append(data)
        return original(self, settings, model_output, data, weights)

    monkeypatch.setattr(Clipped, "loss_with_weights", recording)
    register(select=lambda micro_batch: selection)
    problem, model = rollout("flux"), GuidedTransformer()
    engine = verl_omni.engine(model, problem.made, "sde", 0.7)
    batch = micro_batch(problem)
    with torch.no_grad():  # the old model's pass
        output = engine.forward_step(batch, loss_function=None, forward_only=True, step=1)[1]["model_output"]
    batch["old_log_probs"] = torch.stack([output["log_probs"]] * 2, dim=1)
    batch["old_prev_sample_mean"] = torch.stack([output["prev_sample_mean"]] * 2, dim=1)
    loss_function = dispatch(verl_omni, actor_config("flow_grpo", CLIP))
    loss, output = engine.forward_step(batch, loss_function=loss_function, forward_only=False, step=1)
    loss.backward()
    assert float(output["metrics"]["actor/ratio_max"]) == pytest.approx(1, abs=1e-6)
    with capture_maps(model.module, selection, cfg=None) as capture, torch.no_grad():
        model.module(hidden_states=problem.sample, encoder_hidden_states=model.texts[0], **model.inputs)
    close(seen[0]["star_maps"], capture.value[:, 0])
    register()  # without select
    engine.forward_step(batch, loss_function=loss_function, forward_only=False, step=1)
    assert len(seen) == 1


def test_maps_need_whole_sequences(verl_omni: World) -> None:
    register(select=lambda micro_batch: TokenSelection.from_positions([[1]] * BATCH))
    problem = rollout("flux")
    engine = verl_omni.engine(GuidedTransformer(), problem.made, "sde", 0.7)
    arguments = (micro_batch(problem), dispatch(verl_omni, actor_config("flow_grpo")), False, 1)
    engine.ulysses_sequence_parallel_size = 2
    with pytest.raises(ValueError, match=r"ulysses_sequence_parallel_size must be 1, got 2"):
        engine.forward_step(*arguments)


def test_select_without_maps_is_an_error(verl_omni: World) -> None:
    register(select=lambda micro_batch: None)
    loss, problem = verl_omni.registry["flow_grpo"], rollout("sd3")
    data = {"old_log_probs": 0, "advantages": 0}
    with pytest.raises(KeyError, match=r"lacks star_maps, although register\(\) was given select"):
        loss.validate_inputs(loss_name="flow_grpo", model_output={"log_probs": 0}, data=data)
    register(select=lambda micro_batch: TokenSelection.from_positions([[1]] * BATCH))
    engine = verl_omni.engine(lambda x: problem.new_v, problem.made, "sde", 0.7)
    engine.module = GuidedTransformer()  # a model that the captured engine does not run
    engine.module.forward = lambda x: problem.new_v  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no maps were captured"):
        engine.forward_step(micro_batch(problem), dispatch(verl_omni, actor_config("flow_grpo")), False, 1)


def test_prompts_are_the_last_message_of_the_user() -> None:
    chat = [{"role": "system", "content": "no"}, {"role": "user", "content": 'a sign that says "hi"'}]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red bench"}]}]
    assert prompts_of({"raw_prompt": [chat, parts, "plain"]}) == ['a sign that says "hi"', "a red bench", "plain"]
    with pytest.raises(KeyError, match=r"lacks raw_prompt: set data\.return_raw_chat=True"):
        prompts_of({})
    with pytest.raises(ValueError, match="raw_prompt must be a chat with a message of the user"):
        prompts_of({"raw_prompt": [[{"role": "system", "content": "no"}]]})


def test_maps_are_allocated_in_the_layout_of_their_grid() -> None:
    for shape, layout in {(2, 64): "bp", (2, 8, 8): "bhw", (2, 3, 8, 8): "bfhw"}.items():
        assert map_layout(torch.ones(shape)) == layout
    with pytest.raises(ValueError, match=r"maps must have shape \[B, P\], \[B, h, w\] or \[B, F, h, w\], got \[2\]"):
        map_layout(torch.ones(2))


def test_one_pass_is_recorded_and_later_ones_are_not_captured() -> None:
    model, latents = GuidedTransformer(), rollout("flux").sample
    selection = TokenSelection.from_positions([[1, 2]] * BATCH)
    with torch.no_grad():
        expected = model(latents)
        with record_maps(model.module, selection, cfg=None) as whole:
            model(latents)
        with record_maps(model.module, selection, passes=1, cfg=None) as first:
            close(model(latents), expected, 1e-5)
    assert len(whole.maps) == 2
    assert len(first.maps) == 1
    assert torch.equal(first.maps[0], whole.maps[0])


def test_arguments_of_a_forward_with_kwargs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latents = GuidedTransformer(), rollout("flux").sample
    selection = TokenSelection.from_positions([[1, 2]] * BATCH)
    with torch.no_grad(), record_maps(model.module, selection, cfg=None) as expected:
        model(latents)
    original = FluxTransformer2DModel.forward

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        return original(self, hidden_states, **kwargs)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", forward)
    with torch.no_grad(), record_maps(model.module, selection, cfg=None) as found:
        model(latents)
    assert torch.equal(found.maps[0], expected.maps[0])
