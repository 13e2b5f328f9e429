"""A chosen block without maps: passes that skip layers are not captured, other causes are errors that name them."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from tiny_models import CASES

from star_kernels.capture import capture_maps
from star_kernels.integrations.record import record_maps

CASE = CASES["sd3"]


@pytest.fixture
def model_and_inputs():
    return CASE.make()


@torch.no_grad()
def test_a_pass_that_skips_layers_is_not_captured(model_and_inputs):
    """As pipelines run it for skip-layer guidance, after the pass for classifier-free guidance."""
    model, inputs = model_and_inputs
    skipped = model(**inputs, skip_layers=[1]).sample
    guided = {name: torch.cat([value, value]) for name, value in inputs.items()}
    with capture_maps(model, CASE.selection) as maps:
        model(**guided)
        value = maps.value
        assert torch.equal(model(**inputs, skip_layers=[1]).sample, skipped)
        assert maps.value is value
    with record_maps(model, CASE.selection) as recorded:
        for _ in range(2):
            model(**guided)
            model(**inputs, skip_layers=[1])
    assert len(recorded.maps) == 2
    assert torch.equal(recorded.maps[1], value)


@torch.no_grad()
def test_a_recording_keeps_only_passes_that_were_captured(model_and_inputs):
    model, inputs = model_and_inputs
    with record_maps(model, CASE.selection) as recorded:
        model(**inputs)
        recorded._capture.enabled = False
        model(**inputs)
    assert len(recorded.maps) == 1


def fails(model, inputs, message):
    with torch.no_grad(), capture_maps(model, CASE.selection), pytest.raises(RuntimeError, match=message):
        model(**inputs)


@torch.no_grad()
def test_a_replaced_processor_is_named(model_and_inputs):
    model, inputs = model_and_inputs
    output = model(**inputs).sample
    with capture_maps(model, CASE.selection):
        model.fuse_qkv_projections()
        with pytest.raises(
            RuntimeError,
            match=r"no maps from transformer_blocks\.0\.attn, .*: its attention processor was replaced during the "
            r"capture by a FusedJointAttnProcessor2_0; fuse_qkv_projections",
        ):
            model(**inputs)
    with capture_maps(model, CASE.selection) as maps:
        torch.testing.assert_close(model(**inputs).sample, output, rtol=1e-4, atol=1e-4)
    assert maps.ready
    one = model.transformer_blocks[0].attn
    with capture_maps(model, CASE.selection):
        model.transformer_blocks[1].attn.processor = one.processor
        with pytest.raises(RuntimeError, match=r"from transformer_blocks\.1\.attn: .* belongs to another module"):
            model(**inputs)


def test_hooks_that_reuse_an_earlier_output_are_named():
    case = CASES["flux"]
    model, inputs = case.make()
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)
    with torch.no_grad(), capture_maps(model, case.selection) as maps, model.cache_context("cond"):
        model(**inputs)
        assert maps.ready
        with pytest.raises(
            RuntimeError, match=r"it did not run in this pass\. .*\(pyramid_attention_broadcast\).*disable_cache\(\)"
        ):
            model(**inputs)
    model.disable_cache()
    with torch.no_grad(), capture_maps(model, case.selection) as maps:
        model(**inputs)
        model(**inputs)
    assert maps.ready


def test_a_block_cache_is_named():
    case = CASES["flux"]
    model, inputs = case.make()
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e6))
    with torch.no_grad(), capture_maps(model, case.selection), model.cache_context("cond"):
        model(**inputs)
        with pytest.raises(RuntimeError, match=r"did not run in this pass\. .*\(fbc_block_hook\)"):
            model(**inputs)


def test_a_block_that_the_model_skips_is_named(model_and_inputs):
    model, inputs = model_and_inputs
    model.transformer_blocks[1].forward = lambda hidden_states, encoder_hidden_states, **_: (
        encoder_hidden_states,
        hidden_states,
    )
    fails(model, inputs, r"no maps from transformer_blocks\.1\.attn: it did not run in this pass: choose blocks that")


def test_another_attention_backend_is_named(model_and_inputs):
    model, inputs = model_and_inputs

    class JointAttnProcessor2_0:
        def __call__(self, attn, hidden_states, encoder_hidden_states, **options):
            return hidden_states, encoder_hidden_states

    model.transformer_blocks[1].attn.processor = JointAttnProcessor2_0()
    fails(
        model,
        inputs,
        r"\.1\.attn: its attention was not computed by .*set_attention_backend\(\"native\"\)",
    )
