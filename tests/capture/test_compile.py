"""A compiled model under capture: one graph, the same maps, and no new graph for a new selection or a new context."""

import pytest
import torch
from tiers import mostly_exhaustive
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

pytest.importorskip("diffusers")

from tiny_models import CASES

from star_kernels import TokenSelection
from star_kernels.capture import attach_maps, capture_maps


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def make(family):
    """A model with one block of each kind, because compiling is slow."""
    case = CASES[family]
    model, inputs = case.make()
    for name in ("transformer_blocks", "single_transformer_blocks"):
        if hasattr(model, name):
            setattr(model, name, getattr(model, name)[:1])
    return case, model, inputs


def eager_maps(model, inputs, selection):
    with torch.no_grad(), capture_maps(model, selection, cfg=None) as maps:
        model(**inputs)
    return maps.value


@pytest.mark.exhaustive
@torch.no_grad()
def test_no_new_graph_for_a_new_selection_or_a_new_context():
    case, model, inputs = make("sd3.5")
    other = TokenSelection.from_positions([[[1], [0, 2]], [[4], [5]]]).shift(case.text)
    selections = [case.selection, other]
    expected = [eager_maps(model, inputs, selection) for selection in selections]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(**inputs).sample
    assert graphs() == 1
    for _ in range(5):
        for selection, value in zip(selections, expected, strict=True):
            with capture_maps(compiled, selection, cfg=None) as maps:
                assert torch.equal(compiled(**inputs).sample, output)
            torch.testing.assert_close(maps.value, value, rtol=0, atol=1e-6)
            assert torch.equal(compiled(**inputs).sample, output)
    assert graphs() == 2
    handle = attach_maps(compiled, cfg=None)
    for selection, value in zip(selections, expected, strict=True):
        handle.selection = selection
        compiled(**inputs)
        torch.testing.assert_close(handle.value, value, rtol=0, atol=1e-6)
        handle.enabled = False
        compiled(**inputs)
        handle.enabled = True
    handle.remove()
    assert graphs() == 3  # one for enabled = False
    # The hooks are not compiled: they would be recompiled for every handle, up to a limit.
    assert not [m for m in get_compilation_metrics() if "star_kernels" in m.co_filename]


@torch.no_grad()
@pytest.mark.parametrize("family", mostly_exhaustive(["flux", "flux2", "qwen-image", "pixart"], ["flux"]))
def test_the_compiled_model_gives_the_same_maps_from_one_graph(family):
    case, model, inputs = make(family)
    expected = eager_maps(model, inputs, case.selection)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(eager_maps(compiled, inputs, case.selection), expected, rtol=0, atol=1e-6)
    assert graphs() == 1


@pytest.mark.exhaustive
def test_blocks_compiled_one_by_one_and_in_place_work():
    case, model, inputs = make("flux")
    expected = eager_maps(model, inputs, case.selection)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(eager_maps(model, inputs, case.selection), expected, rtol=0, atol=1e-6)
    _, model, inputs = make("flux")
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(eager_maps(model, inputs, case.selection), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointed", mostly_exhaustive([False, True], [False]))
def test_the_compiled_model_has_the_same_gradients(checkpointed):
    case, model, inputs = make("sd3.5")
    if checkpointed:
        model.enable_gradient_checkpointing()
    latent = inputs["hidden_states"].requires_grad_()

    def run(model):
        with capture_maps(model, case.selection, cfg=None, detach=False) as maps:
            loss = model(**inputs).sample.square().mean() + maps.value.square().sum()
        return maps.value.detach(), torch.autograd.grad(loss, [latent, model.context_embedder.weight])

    expected = run(model)
    found = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert graphs() == 1
    assert not torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint
