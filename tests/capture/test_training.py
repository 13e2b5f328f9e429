"""Capture works with checkpointing, LoRA, sharding, quantised layers, and losses on maps."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import CASES

from star_kernels import TokenSelection
from star_kernels.capture import attach_maps, capture_maps
from star_kernels.integrations.record import record_maps

FAMILIES = ["sd3.5", "flux", "qwen-image", "sd"]


def loss_of(model, inputs):
    return model(**inputs).sample.square().mean()


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * (1 + gradient.abs().max()))


def plain(case):
    """Model, inputs, the loss's gradients and the maps, without checkpointing."""
    model, inputs = case.make()
    loss_of(model, inputs).backward()
    expected = gradients(model)
    with torch.no_grad(), capture_maps(model, case.selection, cfg=None) as maps:
        model(**inputs)
    return model, inputs, expected, maps.value


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_are_recorded_once_and_give_the_same_gradients(family):
    case = CASES[family]
    model, inputs, expected, expected_maps = plain(case)
    model.enable_gradient_checkpointing()
    functions = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    with capture_maps(model, case.selection, cfg=None) as maps:
        loss_of(model, inputs).backward()
    torch.testing.assert_close(maps.value, expected_maps, rtol=0, atol=1e-6)
    assert_same(gradients(model), expected)
    after = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert all(a is b for a, b in zip(functions, after, strict=True))


@pytest.mark.parametrize("family", ["sd3.5", "sd"])
def test_a_checkpointed_block_is_recomputed_as_it_ran_first(family):
    """Even after the capture was removed or the selection has changed."""
    case = CASES[family]
    model, inputs, expected, expected_maps = plain(case)
    model.enable_gradient_checkpointing()
    longer = TokenSelection.from_positions([[0, 1, 2, 3]] * 2)
    with capture_maps(model, case.selection, cfg=None) as maps:
        first = loss_of(model, inputs)
        taken = maps.take()
        first.backward(retain_graph=True)
        assert_same(gradients(model), expected)
        with pytest.raises(RuntimeError, match="no maps yet"):  # a recomputed block records none
            _ = maps.value
        maps.selection = longer
        second = loss_of(model, inputs)
        later = maps.value
        maps.enabled = False
        third = loss_of(model, inputs)
    for loss in (second, first, third):
        loss.backward()
        assert_same(gradients(model), expected)
    torch.testing.assert_close(taken, expected_maps, rtol=0, atol=1e-6)
    assert torch.equal(maps.value, later)


def test_a_pass_that_fails_restores_the_checkpointing_function():
    case = CASES["sd3.5"]
    model, inputs = case.make()
    model.enable_gradient_checkpointing()
    function = model._gradient_checkpointing_func
    model.transformer_blocks[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with capture_maps(model, case.selection, cfg=None):
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        assert model._gradient_checkpointing_func is function


def test_captures_of_different_blocks_restore_the_checkpointing_function():
    case = CASES["sd3.5"]
    model, inputs, expected, _ = plain(case)
    model.enable_gradient_checkpointing()
    function = model._gradient_checkpointing_func
    with capture_maps(model, case.selection, blocks=[0]) as one, capture_maps(model, case.selection, blocks=[1]) as two:
        loss_of(model, inputs).backward()
        assert one.ready
        assert two.ready
    assert_same(gradients(model), expected)
    assert model._gradient_checkpointing_func is function
    doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
    loss_of(model, doubled).backward()  # no longer captured
    assert_same(gradients(model), expected)


def test_checkpoint_wrappers_of_pytorch_work_inside_the_context():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    case = CASES["sd3.5"]
    model, inputs, expected, expected_maps = plain(case)
    blocks = set(model.transformer_blocks)
    apply_activation_checkpointing(model, check_fn=lambda module: module in blocks)
    with capture_maps(model, case.selection, cfg=None) as maps:
        loss_of(model, inputs).backward()
    torch.testing.assert_close(maps.value, expected_maps, rtol=0, atol=1e-6)
    found = gradients(model)
    assert_same({name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}, expected)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["sd3.5", "flux", "sd"])
def test_maps_are_differentiable_on_request(family, checkpointed):
    """The gradient of a loss on the maps with respect to the latent, as Attend-and-Excite needs it."""
    case = CASES[family]
    model, inputs = case.make()
    name = "sample" if "sample" in inputs else "hidden_states"
    latent = inputs[name].requires_grad_()

    def guidance(maps):
        return (1 - maps[:, 0].flatten(1).amax(dim=1)).sum() + maps[0, 1].square().sum()

    reference = guidance(expected_maps(model, inputs, case, case.selection))
    (expected,) = torch.autograd.grad(reference, latent)
    if checkpointed:
        model.enable_gradient_checkpointing()
    with capture_maps(model, case.selection, cfg=None, detach=False) as maps:
        model(**inputs)
        (found,) = torch.autograd.grad(guidance(maps.take()), latent)
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max())


def reentrant(model, wrapped):
    """Reentrant checkpointing, which runs the first forward pass without gradients."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    if not wrapped:
        return model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    kind = partial(wrappers.checkpoint_wrapper, checkpoint_impl=wrappers.CheckpointImpl.REENTRANT)
    blocks = set(model.transformer_blocks)
    return wrappers.apply_activation_checkpointing(model, kind, check_fn=lambda module: module in blocks)


@pytest.mark.parametrize("wrapped", [False, True], ids=["diffusers", "PyTorch"])
def test_differentiable_maps_under_reentrant_checkpointing_are_an_error(wrapped):
    case = CASES["sd3.5"]
    model, inputs, expected, expected_maps = plain(case)
    reentrant(model, wrapped)
    with (
        capture_maps(model, case.selection, detach=False) as maps,
        pytest.raises(ValueError, match=r"transformer_blocks\.0\..*attn runs without gradients .*use_reentrant=False"),
    ):
        model(**inputs)
    with capture_maps(model, case.selection) as maps:  # detached maps are supported
        loss_of(model, inputs).backward()
    torch.testing.assert_close(maps.value, expected_maps, rtol=0, atol=1e-6)
    found = gradients(model)
    assert_same({name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}, expected)
    with torch.no_grad(), capture_maps(model, case.selection, detach=False) as maps:
        model(**inputs)
    assert not maps.value.requires_grad


def lora(model):
    peft = pytest.importorskip("peft")
    model.requires_grad_(False)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["to_q", "to_k", "to_v"]}
    return peft.LoraConfig(**options)


@pytest.mark.parametrize("family", ["sd3.5", "flux", "qwen-image"])
def test_lora_gradients_are_those_without_capture(family):
    case = CASES[family]
    model, inputs = case.make()
    model.add_adapter(lora(model))
    loss_of(model, inputs).backward()
    expected = gradients(model)
    assert expected
    assert all("lora" in name for name in expected)
    with capture_maps(model, case.selection, cfg=None) as maps:
        loss_of(model, inputs).backward()
    assert_same(gradients(model), expected)
    torch.testing.assert_close(
        maps.value, expected_maps(model, inputs, case, case.selection).detach(), rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_a_pass_of_the_reference_model_keeps_the_maps():
    case = CASES["sd3.5"]
    model, inputs = case.make()
    reference = expected_maps(model, inputs, case, case.selection)
    reference_output = model(**inputs).sample
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, lora(model))  # as Flow-GRPO wraps it
    with attach_maps(adapted, case.selection, cfg=None) as maps:
        adapted(**inputs)
        trained = maps.value
        maps.enabled = False
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(**inputs).sample, reference_output)
        assert torch.equal(maps.value, trained)
        maps.enabled = True
        with adapted.disable_adapter():
            adapted(**inputs)
    torch.testing.assert_close(maps.value, reference, rtol=0, atol=1e-5)
    assert (trained - reference).abs().max() > 1e-3


class Int8Linear(nn.Module):
    """A quantised linear layer with a scale for each output."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Buffer(linear.weight.abs().amax(dim=1, keepdim=True) / 127)
        self.weight = nn.Buffer((linear.weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@torch.no_grad()
def test_quantised_layers_work():
    case = CASES["flux"]
    model, inputs = case.make()
    unquantised = expected_maps(model, inputs, case, case.selection)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    with capture_maps(model, case.selection, cfg=None) as maps:
        model(**inputs)
    torch.testing.assert_close(maps.value, expected_maps(model, inputs, case, case.selection), rtol=0, atol=1e-5)
    assert not torch.equal(maps.value, unquantised)


@pytest.fixture
def one_process(tmp_path):
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("gloo is not available")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_works(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    case = CASES["sd3.5"]
    model, inputs, expected, expected_maps = plain(case)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with capture_maps(model, case.selection, cfg=None) as maps:
        loss_of(model, inputs).backward()
    torch.testing.assert_close(maps.value, expected_maps, rtol=0, atol=1e-6)
    assert_same({name: gradient.full_tensor() for name, gradient in gradients(model).items()}, expected)


def test_distributed_data_parallel_works(one_process):
    case = CASES["flux"]
    model, inputs, _, expected = plain(case)
    parallel = nn.parallel.DistributedDataParallel(model)
    with torch.no_grad(), capture_maps(parallel, case.selection, cfg=None) as maps:
        parallel(**inputs)
    assert torch.equal(maps.value, expected)


@torch.no_grad()
def test_a_copy_of_a_captured_model_is_not_captured():
    """For example the copy of an exponential moving average."""
    case = CASES["flux"]
    model, inputs = case.make()
    processor = type(model.transformer_blocks[0].attn.processor)
    with capture_maps(model, case.selection, cfg=None) as maps:
        model(**inputs)
        value = maps.value
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**inputs).sample, model(**inputs).sample)
        copied(**{**inputs, "hidden_states": -inputs["hidden_states"]})
        assert torch.equal(maps.value, value)
    assert type(copied.transformer_blocks[0].attn.processor) is processor


@torch.no_grad()
def test_a_captured_model_is_saved_without_its_capture():
    case = CASES["sd3"]
    model, inputs = case.make()
    processor = type(model.transformer_blocks[0].attn.processor)
    file = io.BytesIO()
    with record_maps(model, case.selection) as recorded:
        output = model(**inputs).sample
        torch.save(model, file)
        model(**inputs)
    assert len(recorded.maps) == 2
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert type(loaded.transformer_blocks[0].attn.processor) is processor
    assert torch.equal(loaded(**inputs).sample, output)
    assert b"star_kernels" not in file.getvalue()  # loading does not need the library
