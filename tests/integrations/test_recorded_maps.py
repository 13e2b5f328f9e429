"""record_maps stores the maps of each forward pass, and computes weights with mean one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffusers

from star_kernels import TokenSelection, allocate
from star_kernels.capture import MapCapture, attach_maps, capture_maps
from star_kernels.integrations.flow_grpo import record_maps
from star_kernels.integrations.record import RecordedMaps

ROWS, COLUMNS, TEXT, BATCH = 4, 6, 5, 2
SELECTION = TokenSelection.from_positions([[[0], [1, 2]], [[3], []]])


def sd3() -> tuple[nn.Module, Any, TokenSelection]:
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=16,
    )  # fmt: skip

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(BATCH, 4, 2 * ROWS, 2 * COLUMNS, generator=generator).repeat(2, 1, 1, 1),
            "encoder_hidden_states": torch.randn(2 * BATCH, TEXT, 32, generator=generator),
            "pooled_projections": torch.randn(2 * BATCH, 16, generator=generator),
            "timestep": torch.full((2 * BATCH,), 500.0),
        }

    return model.eval(), inputs, SELECTION


@torch.no_grad()
def test_every_pass_is_recorded_as_it_is_captured() -> None:
    model, inputs, selection = sd3()
    with record_maps(model, selection) as recorded:
        for seed in range(3):
            model(**inputs(seed))
    assert len(recorded.maps) == 3
    for seed, maps in enumerate(recorded.maps):
        with capture_maps(model, selection) as capture:
            model(**inputs(seed))
        assert torch.equal(maps, capture.value)
    model(**inputs(4))
    assert len(recorded.maps) == 3


@torch.no_grad()
@pytest.mark.parametrize("over", ["step", "trajectory"])
def test_weights_are_the_allocation_of_the_sum_over_phrases(over: str) -> None:
    model, inputs, selection = sd3()
    with record_maps(model, selection) as recorded:
        for seed in range(3):
            model(**inputs(seed))
    weights = recorded.weights(strength=0.5, over=over, cap=1.2)
    assert weights.shape == (BATCH, 3, ROWS, COLUMNS)
    mass = torch.stack([maps.sum(dim=1) for maps in recorded.maps], dim=1).flatten(2)
    assert torch.equal(weights.flatten(2), allocate(mass, layout="bsp", strength=0.5, over=over, cap=1.2))
    torch.testing.assert_close(weights.mean(dim=(2, 3) if over == "step" else (1, 2, 3)).mean(), torch.tensor(1.0))


@torch.no_grad()
def test_a_model_wrapped_by_peft_is_recorded_and_restored() -> None:
    peft = pytest.importorskip("peft")
    model, inputs, selection = sd3()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attn.to_q"]))
    before = adapted(**inputs(0))[0]
    with record_maps(adapted, selection) as recorded:
        torch.testing.assert_close(adapted(**inputs(0))[0], before, rtol=0, atol=1e-5)
        model(**inputs(0))  # with or without the wrapper
    assert len(recorded.maps) == 2
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_an_exception_ends_the_recording() -> None:
    model, inputs, selection = sd3()
    broken = {**inputs(0), "encoder_hidden_states": None}
    with pytest.raises((TypeError, AttributeError)), record_maps(model, selection) as recorded:
        model(**broken)
    model(**inputs(1))
    assert recorded.maps == []


@torch.no_grad()
def test_a_pass_that_fails_after_its_blocks_is_not_recorded() -> None:
    model, inputs, selection = sd3()
    with record_maps(model, selection) as recorded:
        hook = model.proj_out.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs(0))
        hook.remove()
        model(**inputs(1), skip_layers=[0])
    assert recorded.maps == []


def test_weights_without_recorded_maps_are_an_error() -> None:
    model, _, selection = sd3()
    with record_maps(model, selection) as recorded:
        pass
    with pytest.raises(RuntimeError, match="no maps were recorded: the transformer did not run"):
        recorded.weights()


def test_options_are_those_of_attach_maps() -> None:
    """capture_maps and record_maps pass every option on."""
    options = inspect.signature(attach_maps).parameters
    for function in (capture_maps, record_maps):
        own = {name: p for name, p in inspect.signature(function).parameters.items() if name != "passes"}
        assert own.keys() == options.keys()
        assert all(own[name].default == p.default for name, p in options.items() if name != "selection")
    calls: list[dict[str, Any]] = []

    @contextmanager
    def recording(*arguments: Any, **given: Any) -> Iterator[MapCapture]:
        calls.append(given)
        with attach_maps(*arguments) as capture:
            yield capture

    transformer, _, selection = sd3()
    given = {name: object() for name, p in options.items() if p.kind is p.KEYWORD_ONLY}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("star_kernels.capture.attach_maps", recording)
        with capture_maps(transformer, selection, **given):
            pass
        with record_maps(transformer, selection, **given):
            pass
    assert calls == [given, given]


def test_weights_of_a_video() -> None:
    maps = torch.rand(2, 3, 2, 4, 5)  # [B, G, f, h, w]
    capture: Any = None  # weights() does not read it
    recorded = RecordedMaps(capture)
    recorded.maps = [maps, 2 * maps]
    expected = allocate(torch.stack([maps.sum(1), 2 * maps.sum(1)], dim=1), layout="bsfhw")
    torch.testing.assert_close(recorded.weights(), expected)
