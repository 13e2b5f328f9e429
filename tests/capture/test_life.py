"""Changes of the model around a capture, copies of it, and captures whose handle is lost."""

import asyncio
import copy
import gc
import io
import itertools
import weakref

import pytest
import torch

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import CASES

from star_kernels.capture import attach_maps, capture_maps, detach_maps, live_captures

CASE = CASES["sd3"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model_and_inputs():
    return CASE.make()


def same_maps(maps, model, inputs, case=CASE):
    value, maps.enabled = maps.value, False
    torch.testing.assert_close(value, expected_maps(model, inputs, case, case.selection), rtol=0, atol=1e-5)
    maps.enabled = True


@pytest.mark.parametrize("family", ["sd3", "flux", "sd"])
def test_projections_fused_before_or_unfused_after_a_capture(family):
    case = CASES[family]
    model, inputs = case.make()
    output, expected = model(**inputs).sample, expected_maps(model, inputs, case, case.selection)
    model.fuse_qkv_projections()
    with capture_maps(model, case.selection) as maps:
        torch.testing.assert_close(model(**inputs).sample, output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(model(**inputs).sample, output)


@pytest.mark.parametrize("family", ["sd3", "flux", "sd"])
def test_projections_fused_during_a_capture_work_or_are_an_error_until_they_are_unfused(family):
    case = CASES[family]
    model, inputs = case.make()
    output = model(**inputs).sample
    with capture_maps(model, case.selection) as maps:
        model.fuse_qkv_projections()
        if family == "flux":  # its processor computes fused projections too
            model(**inputs)
            same_maps(maps, model, inputs, case)
        else:
            with pytest.raises(RuntimeError, match="processor was replaced during the capture by a Fused"):
                model(**inputs)
            assert not maps.ready
        model.unfuse_qkv_projections()
        model(**inputs)
        same_maps(maps, model, inputs, case)
    torch.testing.assert_close(model(**inputs).sample, output, rtol=0, atol=1e-5)


def adapter(model, scale):
    import peft

    config = peft.LoraConfig(target_modules=["to_q", "to_k"], r=2, init_lora_weights=False)
    torch.manual_seed(int(scale))
    model.add_adapter(config, adapter_name=f"a{scale}")


def test_adapters_change_during_a_capture(model_and_inputs):
    pytest.importorskip("peft")
    model, inputs = model_and_inputs
    before = model(**inputs).sample

    def check():
        output = model(**inputs).sample
        same_maps(maps, model, inputs)
        maps.enabled = False
        torch.testing.assert_close(model(**inputs).sample, output, rtol=1e-4, atol=1e-4)
        maps.enabled = True
        return maps.value

    with attach_maps(model, CASE.selection) as maps:
        found = [check()]
        adapter(model, 1)
        found.append(check())
        adapter(model, 2)
        model.set_adapter("a2")
        found.append(check())
        with torch.no_grad():  # a hot swap copies other weights into the adapter
            for name, parameter in model.named_parameters():
                if "lora_" in name and ".a2." in name:
                    parameter.mul_(0.5)
        found.append(check())
        model.fuse_lora(adapter_names=["a2"])
        torch.testing.assert_close(check(), found[-1], rtol=0, atol=1e-5)
        model.unfuse_lora()
        model.disable_adapters()
        torch.testing.assert_close(check(), found[0], rtol=0, atol=1e-5)
        model.delete_adapters(["a1", "a2"])
        check()
    torch.testing.assert_close(model(**inputs).sample, before, rtol=1e-4, atol=1e-4)
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.pairwise(found))


def test_an_image_prompt_adapter_loaded_during_a_capture_is_named():
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    case = CASES["sd"]
    model, inputs = case.make()
    with capture_maps(model, case.selection) as maps:
        attention = model.mid_block.attentions[0].transformer_blocks[0].attn2
        attention.set_processor(IPAdapterAttnProcessor2_0(hidden_size=32, cross_attention_dim=32))
        inputs["encoder_hidden_states"] = torch.randn(2, 11, 32)  # four of them of the image
        with pytest.raises(RuntimeError, match=r"mid_block.*attn2: .* replaced during the capture by a IPAdapter"):
            model(**inputs)
    del maps


def offload_accelerate(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offload_groups(model):
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def offload_leaves(model):
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def cast(model):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize("before", [True, False], ids=["before the capture", "during it"])
@pytest.mark.parametrize("change", [offload_accelerate, offload_groups, offload_leaves, cast])
def test_offloading_and_layerwise_casting(change, before, model_and_inputs):
    model, inputs = model_and_inputs
    change(model) if before else None
    with capture_maps(model, CASE.selection) as maps:
        None if before else change(model)
        output = model(**inputs).sample
    same_maps(maps, model, inputs)
    torch.testing.assert_close(output, model(**inputs).sample, rtol=1e-4, atol=1e-4)


def test_a_block_that_is_offloaded_and_does_not_run_is_not_said_to_be_cached(model_and_inputs):
    model, inputs = model_and_inputs
    offload_groups(model)
    model.transformer_blocks[1].forward = lambda hidden_states, encoder_hidden_states, **_: (
        encoder_hidden_states,
        hidden_states,
    )
    with capture_maps(model, CASE.selection), pytest.raises(RuntimeError, match="in this pass: choose blocks that run"):
        model(**inputs)


def test_a_change_of_dtype_between_passes(model_and_inputs):
    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection) as maps:
        model(**inputs)
        single = maps.value
        model.to(torch.float64)
        model(**{name: value.double() for name, value in inputs.items()})
        torch.testing.assert_close(maps.value.float(), single, rtol=0, atol=1e-5)


def test_context_parallelism_of_the_model_is_an_error(model_and_inputs):
    from diffusers import ContextParallelConfig, ParallelConfig

    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection, blocks=[0]) as maps:
        model._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2))
        with pytest.raises(
            ValueError, match=r"transformer uses context parallelism.*part of the maps.*enabled = False"
        ):
            model(**inputs)
        assert not maps.ready


def test_the_mean_over_tensor_parallel_devices_is_that_of_all_heads(model_and_inputs):
    """Each device has the weights of some heads."""
    model, inputs = model_and_inputs
    found = []
    for rank in range(2):
        part = copy.deepcopy(model)
        attention = part.transformer_blocks[0].attn
        attention.heads = 1
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            linear = getattr(attention, name)
            linear.weight.data, linear.bias.data = linear.weight.chunk(2)[rank], linear.bias.chunk(2)[rank]
        for linear in (attention.to_out[0], attention.to_add_out):
            linear.weight.data = linear.weight.chunk(2, dim=1)[rank]
        with capture_maps(part, CASE.selection, blocks=[0]) as maps:
            part(**inputs)
        found.append(maps.value)
    expected = expected_maps(model, inputs, CASE, CASE.selection, [0])
    torch.testing.assert_close(torch.stack(found).mean(dim=0), expected, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_copies_and_saved_models_have_no_trace_of_the_capture(model_and_inputs, tmp_path):
    model, inputs = model_and_inputs
    names = set(model.state_dict())
    with capture_maps(model, CASE.selection):
        output = model(**inputs).sample
        assert set(model.state_dict()) == names
        model.save_pretrained(tmp_path / "saved")
        written = io.BytesIO()
        torch.save(model, written)
        copied = copy.deepcopy(model)
        assert len(live_captures()) == 1
    assert all(b"star_kernels" not in file.read_bytes() for file in (tmp_path / "saved").iterdir())
    assert b"star_kernels" not in written.getvalue()
    saved = type(model).from_pretrained(tmp_path / "saved")
    loaded = torch.load(io.BytesIO(written.getvalue()), weights_only=False)
    for other in (copied, saved, loaded):
        assert torch.equal(other(**inputs).sample, output)
        with capture_maps(other, CASE.selection) as maps:
            other(**inputs)
        same_maps(maps, model, inputs)


def test_live_captures_finds_lost_handles(model_and_inputs):
    model, _ = model_and_inputs
    assert live_captures() == []
    attach_maps(model, CASE.selection, blocks=[0])
    attach_maps(model, CASE.selection, blocks=[1, 2]).enabled = False
    gc.collect()
    found = sorted(live_captures(), key=repr)
    assert [repr(capture) for capture in found] == [
        "<MapCapture of SD3Transformer2DModel, blocks [0], enabled>",
        "<MapCapture of SD3Transformer2DModel, blocks [1, 2], not enabled>",
    ]
    found[0].remove()
    assert live_captures() == found[1:]
    assert "removed" in repr(found[0])
    assert detach_maps(model) == 1
    assert live_captures() == []


def test_a_deleted_model_is_freed_with_its_capture():
    model, inputs = CASE.make()
    attach_maps(model, CASE.selection)
    model(**inputs)
    freed = weakref.ref(model), weakref.ref(live_captures()[0])
    del model
    gc.collect()
    assert [reference() for reference in freed] == [None, None]
    assert live_captures() == []


def test_a_hundred_passes_hold_no_more_memory_than_one():
    model, inputs = CASE.make()
    inputs = {name: value[:1] for name, value in inputs.items()}
    inputs["hidden_states"] = inputs["hidden_states"][..., :4, :4]
    selection = type(CASE.selection).from_positions([[4]])

    def held():
        gc.collect()
        return (
            sum(isinstance(found, torch.Tensor) for found in gc.get_objects()),
            len(model._forward_hooks) + len(model._forward_pre_hooks),
            len(maps._passes._callers),
            len(maps._guidance._made),
        )

    with capture_maps(model, selection, blocks=[0]) as maps:
        model(**inputs)
        value = weakref.ref(maps.value)
        block = model.transformer_blocks[0].attn
        hidden, text = torch.zeros(1, 4, 32), torch.zeros(1, 7, 32)
        begin, end = (next(reversed(hooks.values())) for hooks in (model._forward_pre_hooks, model._forward_hooks))
        once = held()
        for _ in range(100):  # passes of the one captured block
            begin(model, (), inputs)
            block(hidden, encoder_hidden_states=text)
            end(model, (), hidden)
        assert maps.value is not value()
        assert value() is None
        assert held() == once


def test_the_model_may_not_be_called_within_its_own_captured_pass(model_and_inputs):
    model, inputs = model_and_inputs

    def again(module, arguments):
        hook.remove()
        model(**inputs)

    with capture_maps(model, CASE.selection) as maps:
        hook = model.transformer_blocks[1].register_forward_pre_hook(again)
        with pytest.raises(RuntimeError, match=r"called within its own captured pass, .*copy\.deepcopy"):
            model(**inputs)
        assert not maps.ready
        model(**inputs)
        same_maps(maps, model, inputs)


def test_a_pass_after_an_interrupted_one_is_complete(model_and_inputs):
    model, inputs = model_and_inputs

    def interrupt(module, arguments):
        hook.remove()
        raise KeyboardInterrupt

    with capture_maps(model, CASE.selection) as maps:
        model(**inputs)
        hook = model.transformer_blocks[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        with pytest.raises(RuntimeError, match="no maps yet: 1 of 3"):
            _ = maps.value
        model(**inputs)
        same_maps(maps, model, inputs)
        maps.enabled = False
        model(**inputs)
        assert maps.ready
    hook = model.transformer_blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), capture_maps(model, CASE.selection):
        model(**inputs)
    assert not model._forward_pre_hooks
    assert torch.nn.functional.scaled_dot_product_attention.__module__ != "star_kernels.capture.interception"


def test_a_task_cannot_read_the_maps_of_another_tasks_pass(model_and_inputs):
    model, inputs = model_and_inputs

    async def main():
        first, second = asyncio.Event(), asyncio.Event()

        async def one():
            model(**inputs)
            first.set()
            await second.wait()
            with pytest.raises(RuntimeError, match=r"ran in another task \(two\).*this task's pass are gone"):
                _ = maps.value

        async def two():
            await first.wait()
            model(**{**inputs, "hidden_states": -inputs["hidden_states"]})
            second.set()
            return maps.value

        found = await asyncio.gather(asyncio.create_task(one()), asyncio.create_task(two(), name="two"))
        return found[1]

    with capture_maps(model, CASE.selection) as maps:
        value = asyncio.run(main())
        assert torch.equal(maps.value, value)  # a caller that has run no passes may read


def test_a_suspended_generator_keeps_its_capture(model_and_inputs):
    model, inputs = model_and_inputs

    def steps():
        with capture_maps(model, CASE.selection) as maps:
            while True:
                model(**inputs)
                yield maps.value

    generator = steps()
    first = next(generator)
    with pytest.raises(ValueError, match="captured already"):
        attach_maps(model, CASE.selection)
    assert torch.equal(next(generator), first)
    generator.close()
    assert live_captures() == []
    assert not model._forward_pre_hooks
