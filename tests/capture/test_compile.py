"""A compiled model under capture: one graph, the same maps, and no new graph for a new selection or a new context."""

import shutil

import pytest
import torch
from tiers import mostly_exhaustive
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

pytest.importorskip("diffusers")

from reused_memory import ReusedMemory
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


def eager_maps(model, inputs, selection, **options):
    with torch.no_grad(), capture_maps(model, selection, cfg=None, **options) as maps:
        model(**inputs)
    return maps.value


@pytest.mark.exhaustive
@torch.no_grad()
def test_no_new_graph_for_a_new_selection_or_a_new_context():
    case, model, inputs = make("sd3.5")
    other = TokenSelection.from_positions([[[1], [0, 2]], [[4], [5]]])
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
@pytest.mark.parametrize("family", mostly_exhaustive([family for family in CASES if family != "sdxl"], ["flux"]))
def test_maps_are_those_of_each_pass_although_its_memory_is_reused(family):
    """CUDA graphs reuse the memory of their outputs. They are skipped if the graph writes to its inputs."""
    case, model, inputs = make(family)
    selection = case.selection
    first = next(iter(inputs))  # the latent
    passes = [{**inputs, first: inputs[first].roll(shift, dims=1)} for shift in range(3)]
    expected = [eager_maps(model, arguments, selection, **case.options) for arguments in passes]
    assert not torch.equal(expected[0], expected[1])
    memory = ReusedMemory()
    compiled = torch.compile(model, fullgraph=True, backend=memory.backend)
    with attach_maps(compiled, selection, cfg=None, **case.options) as maps:
        found = []
        for arguments in passes:
            compiled(**arguments)
            memory.overwrite()  # for example by a pass with enabled = False, before the maps are read
            found.append(maps.take())
        compiled(**passes[-1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert graphs() == 1
    assert not counters["graph_break"]
    assert not memory.mutating
    assert not memory.unsafe


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


TRAINED = [(family, False, False) for family in CASES if family not in ("sdxl", "sd3")]  # as "sd" and "sd3.5"
TRAINED += [(family, False, True) for family in ("sd3.5", "flux", "pixart")]
CHECKPOINTED = [("sd3.5", True, False), ("flux", True, True)]


@pytest.mark.parametrize(
    ("family", "checkpointed", "detach"),
    mostly_exhaustive([*TRAINED, *CHECKPOINTED], lambda *case: case == ("sd3.5", False, False)),
)
def test_the_compiled_model_has_the_same_gradients_in_each_step(family, checkpointed, detach):
    case, model, inputs = make(family)
    if checkpointed:
        model.enable_gradient_checkpointing()
    first = next(iter(inputs))
    latents = [inputs[first].roll(shift, dims=1).requires_grad_() for shift in range(2)]
    weight = next(p for name, p in model.named_parameters() if name.endswith("to_v.weight"))

    def train(model, overwrite=lambda: None):
        results = []
        with capture_maps(model, case.selection, cfg=None, detach=detach, **case.options) as maps:
            for latent in latents:
                loss = model(**{**inputs, first: latent}).sample.square().mean()
                if not detach:
                    loss = loss + maps.value.square().sum()
                results += [g.clone() for g in torch.autograd.grad(loss, [latent, weight])]
                overwrite()
                results.append(maps.value.detach())
        return results

    expected = train(model)
    memory = ReusedMemory()
    found = train(torch.compile(model, fullgraph=True, backend=memory.backend), memory.overwrite)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert graphs() == 1
    assert not memory.mutating
    assert not memory.unsafe
    assert not torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_maps_and_gradients():
    case, model, inputs = make("sd3.5")
    latent = inputs["hidden_states"].requires_grad_()

    def train(model):
        with capture_maps(model, case.selection, cfg=None, detach=False) as maps:
            loss = model(**inputs).sample.square().mean() + maps.value.square().sum()
            return [maps.value.detach(), *torch.autograd.grad(loss, [latent, model.context_embedder.weight])]

    expected = train(model)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(train(compiled), expected, rtol=1e-4, atol=1e-5)
    assert graphs() == 1
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["sd3.5", "flux"])
@pytest.mark.parametrize("training", [False, True])
def test_cuda_graphs_are_not_skipped_and_give_the_maps_of_each_pass(family, training):
    case, model, inputs = make(family)
    model.cuda()
    inputs = {name: value.cuda() for name, value in inputs.items()}
    selection = case.selection.to("cuda")
    first = next(iter(inputs))
    passes = [{**inputs, first: inputs[first].roll(shift, dims=1).requires_grad_(training)} for shift in range(5)]

    def run(model):
        results = []
        with torch.set_grad_enabled(training), capture_maps(model, selection, cfg=None) as maps:
            for arguments in passes:
                output = model(**arguments).sample
                if training:
                    (gradient,) = torch.autograd.grad(output.square().mean(), [arguments[first]])
                    results.append(gradient.clone())
                results.append(output.detach().clone())
                results.append(maps.value)
        return results

    expected = run(model)
    found = run(torch.compile(model, fullgraph=True, mode="reduce-overhead"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert graphs() == 1
    assert not counters["inductor"]["cudagraph_skips"]
