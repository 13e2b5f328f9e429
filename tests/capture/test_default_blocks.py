"""``blocks="default"``: the published blocks in models of the published depth, all blocks in every other model."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import CASES, Case, flux, sd3

from star_kernels.capture import Family, attach_maps, capture_maps

SD3_MEDIUM = {"num_layers": 24}
FLUX_1 = {"num_layers": 19, "num_single_layers": 38}
PUBLISHED = {
    "SD3-Medium": ("sd3", lambda: sd3(**SD3_MEDIUM), (9,)),
    "SD3.5-Medium": (
        "sd3.5",
        lambda: sd3(**SD3_MEDIUM, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
        (9,),
    ),
    "FLUX.1": ("flux", lambda: flux(**FLUX_1), tuple(range(10, 19))),
}
DEPTHS = {
    "SD3.5-Large": ("sd3.5", lambda: sd3(num_layers=38, qk_norm="rms_norm")),
    "fewer double-stream blocks": ("flux", lambda: flux(**{**FLUX_1, "num_layers": 8})),
    "fewer single-stream blocks": ("flux", lambda: flux(**{**FLUX_1, "num_single_layers": 8})),
}


def modules(model):
    """The attention modules in the order of block indices."""
    blocks = (*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ()))
    return [block.attn for block in blocks]


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_blocks_are_captured_and_the_others_run_their_own_attention(name):
    family, build, blocks = PUBLISHED[name]
    case = CASES[family]
    model, inputs = Case(build, case.inputs, case.rows, case.text).make()
    own = [module.processor for module in modules(model)]
    calls = {}

    def remember(module, args, kwargs, output):
        calls[module] = args, kwargs, output

    with capture_maps(model, case.selection, cfg=None) as maps:
        assert maps.blocks == blocks
        for index, (module, processor) in enumerate(zip(modules(model), own, strict=True)):
            assert (module.processor is processor) == (index not in blocks)
        hooks = [module.register_forward_hook(remember, with_kwargs=True) for module in modules(model)]
        model(**inputs)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(
        maps.value, expected_maps(model, inputs, case, case.selection, blocks), rtol=0, atol=1e-5
    )
    for index, module in enumerate(modules(model)):
        args, kwargs, captured = calls[module]
        if index not in blocks:  # without the capture, the same bits
            again = module(*args, **kwargs)
            pairs = zip(_tensors(again), _tensors(captured), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), index


def _tensors(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("name", DEPTHS)
def test_models_of_another_depth_capture_all_blocks(name):
    _, build = DEPTHS[name]
    model = build()
    with attach_maps(model) as maps:
        assert maps.blocks == tuple(range(len(modules(model))))


@pytest.mark.parametrize("family", CASES)
def test_tiny_models_capture_all_blocks(family):
    case = CASES[family]
    model, _ = case.make()
    with attach_maps(model, **case.options) as default, pytest.raises(ValueError, match="captured already"):
        attach_maps(model, blocks="all", **case.options)
    with attach_maps(model, blocks="all", **case.options) as everything:
        assert default.blocks == everything.blocks == tuple(range(len(everything.blocks)))


def test_a_family_declares_its_default_as_indices_or_as_a_function_of_the_model():
    model = nn.Linear(1, 1)
    for default in ((1, 2), lambda found: (1, 2) if found is model else "all"):
        family = Family(lambda model: [], lambda model, arguments: None, default_blocks=default)
        assert family.default_of(model) == (1, 2)
    assert Family(lambda model: [], lambda model, arguments: None).default_of(model) == "all"
