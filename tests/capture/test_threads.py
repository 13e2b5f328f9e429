"""A capture records one thread at a time: no thread reads another's maps."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import CASES

from star_kernels.capture import capture_maps

CASE = CASES["sd3"]


@pytest.fixture
def model_and_inputs():
    model, inputs = CASE.make()
    return model.requires_grad_(False), inputs


def elsewhere(function, *arguments, **options):
    """Runs in a thread of its own, and raises what it raises."""
    with ThreadPoolExecutor(1, thread_name_prefix="elsewhere") as pool:
        return pool.submit(function, *arguments, **options).result()


def test_every_thread_has_its_own_maps_or_an_error(model_and_inputs):
    model, inputs = model_and_inputs
    latents = [inputs["hidden_states"] * (1 + n) for n in range(8)]
    each = [{**inputs, "hidden_states": latent} for latent in latents]
    expected = [expected_maps(model, own, CASE, CASE.selection) for own in each]
    together = threading.Barrier(len(each))

    def run(n):
        found, refused = [], []
        together.wait()
        for _ in range(5):
            try:
                model(**each[n])
                found.append(maps.value)
            except RuntimeError as error:
                refused.append(str(error))
        return found, refused

    with capture_maps(model, CASE.selection) as maps, ThreadPoolExecutor(len(each)) as pool:
        results = list(pool.map(run, range(len(each))))
    for (found, refused), own in zip(results, expected, strict=True):
        assert len(found) + len(refused) == 5
        assert all("another thread" in message for message in refused)
        for value in found:
            torch.testing.assert_close(value, own, rtol=0, atol=1e-5)


def test_a_pass_that_begins_during_another_threads_is_an_error_and_leaves_that_one_intact(model_and_inputs):
    model, inputs = model_and_inputs
    expected = expected_maps(model, inputs, CASE, CASE.selection)

    def interrupt(module, arguments):
        hook.remove()
        with pytest.raises(RuntimeError, match=r"runs a captured pass in another thread \(MainThread\).* copy"):
            elsewhere(model, **{**inputs, "hidden_states": -inputs["hidden_states"]})
        block = model.transformer_blocks[2]  # called on its own it is not part of this pass
        elsewhere(block.attn, torch.ones(2, 60, 32), torch.ones(2, 7, 32))
        assert capture._modules[2].maps is None

    hook = model.transformer_blocks[1].register_forward_pre_hook(interrupt)
    with capture_maps(model, CASE.selection) as capture:
        model(**inputs)
    torch.testing.assert_close(capture.value, expected, rtol=0, atol=1e-5)


def test_maps_that_another_threads_pass_replaced_cannot_be_read(model_and_inputs):
    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection) as maps:
        model(**inputs)
        elsewhere(model, **inputs)
        for read in (lambda: maps.value, maps.take):
            with pytest.raises(RuntimeError, match=r"latest captured pass ran in another thread \(elsewhere.*lock"):
                read()
        model(**inputs)
        assert maps.ready
        maps.take()


def test_a_thread_that_runs_no_pass_reads_the_maps_of_the_one_that_does(model_and_inputs):
    """For example the main thread, if a pipeline runs in a worker."""
    model, inputs = model_and_inputs
    with capture_maps(model, CASE.selection) as maps:
        elsewhere(model, **inputs)
    torch.testing.assert_close(maps.value, expected_maps(model, inputs, CASE, CASE.selection), rtol=0, atol=1e-5)


def test_a_thread_that_died_in_a_pass_does_not_block_others(model_and_inputs):
    model, inputs = model_and_inputs

    def interrupted(module, arguments):
        hook.remove()
        raise KeyboardInterrupt

    hook = model.transformer_blocks[1].register_forward_pre_hook(interrupted)
    with capture_maps(model, CASE.selection) as maps:
        with pytest.raises(KeyboardInterrupt):
            elsewhere(model, **inputs)
        model(**inputs)
    assert maps.ready


def test_copies_of_the_model_are_captured_in_parallel(model_and_inputs):
    """As the error message advises."""
    model, inputs = model_and_inputs
    together = threading.Barrier(2)

    def run(n):
        own, given = copies[n], {**inputs, "hidden_states": inputs["hidden_states"] * (1 + n)}
        with capture_maps(own, CASE.selection) as maps:
            for _ in range(3):
                together.wait()
                own(**given)
        return maps.value

    copies = [model, copy.deepcopy(model)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2)))
    for n, value in enumerate(found):
        given = {**inputs, "hidden_states": inputs["hidden_states"] * (1 + n)}
        torch.testing.assert_close(value, expected_maps(model, given, CASE, CASE.selection), rtol=0, atol=1e-5)


@torch.no_grad()
def test_replicas_of_a_captured_model_are_not_captured(model_and_inputs):
    """DataParallel makes replicas that run in other threads and share hooks and processors with the model."""
    model, inputs = model_and_inputs
    output = model(**inputs).sample
    with capture_maps(model, CASE.selection) as maps:
        model(**inputs)
        value = maps.value
        half = {name: value[:1] for name, value in inputs.items()}
        replica = replicated(model)
        torch.testing.assert_close(elsewhere(replica, **half).sample, output[:1])
        assert torch.equal(maps.value, value)


def replicated(module: nn.Module) -> nn.Module:
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicated(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter)
        replica._parameters[name] = parameter
    return replica


def test_a_checkpointed_block_is_recomputed_in_the_thread_of_the_backward_pass(model_and_inputs):
    """On a GPU autograd has its own threads. This thread runs another pass at the same time."""
    model, inputs = model_and_inputs
    latent = inputs["hidden_states"].requires_grad_()
    (expected,) = torch.autograd.grad(model(**inputs).sample.square().mean(), latent)
    model.enable_gradient_checkpointing()
    found = []

    def backward(module, arguments):
        hook.remove()
        found.extend(elsewhere(torch.autograd.grad, loss, latent))

    with capture_maps(model, CASE.selection) as maps:
        loss = model(**inputs).sample.square().mean()
        maps.selection = CASE.selection.shift(1)
        hook = model.transformer_blocks[1].register_forward_pre_hook(backward)
        model(**inputs)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(
            maps.value, expected_maps(model, inputs, CASE, CASE.selection.shift(1)), rtol=0, atol=1e-5
        )
