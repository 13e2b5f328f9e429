"""Guidance that weakens the model, in a pass of its own or beside the others in the batch."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers.hooks import LayerSkipConfig
from reference_maps import expected_maps
from tiny_models import CASES

from star_kernels.capture import capture_maps

LAYERS = {
    "skip": LayerSkipConfig([1]),
    "feed-forward": LayerSkipConfig([1], skip_attention=False),
    "perturbed": LayerSkipConfig([1], skip_attention=False, skip_attention_scores=True, skip_ff=False),
}


def layer_skip(model, config):
    from diffusers.hooks.layer_skip import _apply_layer_skip_hook

    _apply_layer_skip_hook(model, config, name="SkipLayerGuidance_0")


def smoothed(model):
    from diffusers.hooks.smoothed_energy_guidance_utils import (
        SmoothedEnergyGuidanceConfig,
        _apply_smoothed_energy_guidance_hook,
    )

    config = SmoothedEnergyGuidanceConfig([1], fqn="transformer_blocks")
    _apply_smoothed_energy_guidance_hook(model, config, 1.0, name="SkipLayerGuidance_0")


def unhook(model):
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).remove_hook("SkipLayerGuidance_0", recurse=True)


def perturb(model, kind):
    if kind == "smoothed":
        smoothed(model)
    else:
        layer_skip(model, LAYERS[kind])


@torch.no_grad()
@pytest.mark.parametrize("blocks", [[0], [0, 1]], ids=["other block", "that block"])
@pytest.mark.parametrize("kind", [*LAYERS, "smoothed"])
def test_a_pass_that_a_guider_changes_is_not_captured_and_runs_as_without_a_capture(kind, blocks):
    case = CASES["qwen-image"]
    model, inputs = case.make()
    perturb(model, kind)
    expected = model(**inputs).sample
    unhook(model)
    with capture_maps(model, case.selection, blocks=blocks) as maps:
        perturb(model, kind)
        assert torch.equal(model(**inputs).sample, expected)
        with pytest.raises(
            RuntimeError, match=r"no maps yet.*was not captured, because guidance changed it \(\w+Hook\)"
        ):
            _ = maps.value
        unhook(model)
        model(**inputs)
        value = maps.value
        perturb(model, kind)
        model(**{**inputs, "hidden_states": -inputs["hidden_states"]})
        assert maps.value is value
        unhook(model)
    torch.testing.assert_close(value, expected_maps(model, inputs, case, case.selection, blocks), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_the_conditional_part_of_a_batch_for_perturbed_attention_is_captured(guided):
    """As the PAG pipelines concatenate it: [unconditional,] conditional, perturbed."""
    from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0 as Guided
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0 as Unguided

    case = CASES["sd"]
    model, inputs = case.make()
    expected = expected_maps(model, inputs, case, case.selection)
    text = inputs["encoder_hidden_states"]
    texts = [1 - text, text, text] if guided else [text, text]
    batch = {name: torch.cat([value] * len(texts)) for name, value in inputs.items()}
    batch["encoder_hidden_states"] = torch.cat(texts)
    original = model.attn_processors
    pag = {name: Guided() if guided else Unguided() for name in original if "attn1" in name}
    model.set_attn_processor({**original, **pag})
    output = model(**batch).sample
    for cfg in ("auto", *([] if guided else ["first"])):
        model.set_attn_processor(dict(original))
        with capture_maps(model, case.selection, cfg=cfg) as maps:
            kept = model.attn_processors
            model.set_attn_processor({**kept, **pag})
            torch.testing.assert_close(model(**batch).sample, output, rtol=1e-4, atol=1e-4)
            value = maps.take()
            model.set_attn_processor(dict(kept))
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    model.set_attn_processor({**original, **pag})
    with (
        capture_maps(model, case.selection, cfg="last"),
        pytest.raises(ValueError, match=r"cfg='last' is the part of the batch whose attention is perturbed.*'auto'"),
    ):
        model(**batch)
    with (
        capture_maps(model, case.selection),
        pytest.raises(ValueError, match=r"batch of \d \(\d times the selection's, for perturbed-attention .*, got 12"),
    ):
        model(**{name: torch.cat([value] * 6) for name, value in inputs.items()})


@torch.no_grad()
def test_a_captured_block_with_perturbed_attention_is_named():
    from diffusers.models.attention_processor import PAGCFGJointAttnProcessor2_0

    case = CASES["sd3"]
    model, inputs = case.make()
    batch = {name: torch.cat([value] * 3) for name, value in inputs.items()}
    expected = expected_maps(model, inputs, case, case.selection, [0])
    with capture_maps(model, case.selection) as maps:
        model.transformer_blocks[1].attn.processor = PAGCFGJointAttnProcessor2_0()
        with pytest.raises(
            RuntimeError, match=r"blocks\.1\.attn: its attention processor was replaced .* a PAGCFGJoint"
        ):
            model(**batch)
    with capture_maps(model, case.selection, blocks=[0]) as maps:
        model(**batch)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)
