"""Caches of diffusers that reuse outputs of blocks: passes that run every captured block, and errors in the others."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from reference_maps import expected_maps
from tiny_models import CASES

from star_kernels.capture import capture_maps

TIMESTEP = {"current_timestep_callback": lambda: 500}
current = [2000]  # the timestep of FasterCache, which must begin outside its range
CACHES = {
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=1e6),
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000), **TIMESTEP
    ),
    "FasterCache": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        attention_weight_callback=lambda _: 0.3,
        is_guidance_distilled=True,
        spatial_attention_block_identifiers=("transformer_blocks.*attn",),
        current_timestep_callback=lambda: current[0],
    ),
    "TaylorSeer": lambda: diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1),
    "MagCache": lambda: diffusers.MagCacheConfig(
        threshold=1e6, max_skip_steps=9, retention_ratio=0.0, num_inference_steps=9, mag_ratios=torch.ones(9)
    ),
}
HOOKS = {
    "FirstBlockCache": "fbc_block_hook",
    "PyramidAttentionBroadcast": "pyramid_attention_broadcast",
    "FasterCache": "faster_cache_block",
    "TaylorSeer": "taylorseer_cache",
    "MagCache": "mag_cache_",
}


@torch.no_grad()
@pytest.mark.parametrize("name", CACHES)
def test_a_pass_of_a_cache_is_right_or_an_error_that_names_the_cache(name):
    case = CASES["flux"]
    model, inputs = case.make()
    steps = [{**inputs, "hidden_states": inputs["hidden_states"] * (1 + 0.01 * step)} for step in range(3)]
    errors, current[0] = [], 2000
    with capture_maps(model, case.selection) as maps:
        model.enable_cache(CACHES[name]())
        for step in steps:
            try:
                with model.cache_context("cond"):
                    model(**step)
                current[0] = 500
            except RuntimeError as error:
                errors.append(str(error))
                with pytest.raises(RuntimeError, match="no maps yet"):
                    _ = maps.value
                continue
            found, plain = maps.value, case.make()[0]
            torch.testing.assert_close(found, expected_maps(plain, step, case, case.selection), rtol=0, atol=1e-5)
        assert errors
        for message in errors:
            assert "it did not run in this pass. It has diffusers hooks" in message
            assert HOOKS[name] in message
            assert "disable_cache()" in message
        model.disable_cache()
        model(**steps[0])
    torch.testing.assert_close(maps.value, expected_maps(model, steps[0], case, case.selection), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_block_that_a_cache_always_runs_is_captured_in_every_pass():
    case = CASES["flux"]
    model, inputs = case.make()
    expected = expected_maps(model, inputs, case, case.selection, [0])
    model.enable_cache(CACHES["FirstBlockCache"]())
    with capture_maps(model, case.selection, blocks=[0]) as maps, model.cache_context("cond"):
        for _ in range(3):
            model(**inputs)
            torch.testing.assert_close(maps.take(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_faster_cache_that_halves_the_batch_is_named():
    case = CASES["sd3"]
    model, inputs = case.make()
    config, current[0] = CACHES["FasterCache"](), 2000
    config.spatial_attention_timestep_skip_range = (0, 1)  # it only halves the batch
    config.is_guidance_distilled, config.tensor_format = False, "BCHW"
    config.unconditional_batch_skip_range, config.unconditional_batch_timestep_skip_range = 5, (0, 1000)
    config._unconditional_conditional_input_kwargs_identifiers = tuple(inputs)
    config.low_frequency_weight_callback = config.high_frequency_weight_callback = lambda _: 1.0
    batch = {name: torch.cat([value] * 2) for name, value in inputs.items()}
    expected = expected_maps(model, inputs, case, case.selection)
    diffusers.apply_faster_cache(model, config)
    with capture_maps(model, case.selection) as maps:
        model(**batch)
        torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)
        current[0] = 500
        with pytest.raises(
            ValueError, match=r"FasterCache runs the conditional half alone.*disable_cache\(\).*, got 2"
        ):
            model(**batch)
        assert not maps.ready
