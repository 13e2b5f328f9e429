"""Which part of a batch a selection is for, decided without a wait for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")

from reference_maps import expected_maps
from tiny_models import CASES

from star_kernels import TokenSelection
from star_kernels.capture import attach_maps, capture_maps

DOUBLING = ["sd3", "pixart", "sd", "sdxl"]
HOST_READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero")


def latent_name(inputs):
    return "sample" if "sample" in inputs else "hidden_states"


def guided(inputs):
    """Inputs as pipelines concatenate them: other text first, the latents twice."""

    def twice(name, value):
        if isinstance(value, dict):
            return {n: twice(n, v) for n, v in value.items()}
        if name == "encoder_hidden_states":
            return torch.cat([1 - value, value])
        return value if value is None else torch.cat([value, value])

    return {name: twice(name, value) for name, value in inputs.items()}


def repeated(inputs):
    """Inputs of num_images_per_prompt=2: [A, A, B, B], each with its own noise."""
    batch = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    name = latent_name(inputs)
    return {**batch, name: batch[name] + torch.linspace(0, 1, 4).view(-1, 1, 1, 1)}


@torch.no_grad()
@pytest.mark.parametrize("family", DOUBLING)
def test_batches_with_and_without_guidance_are_distinguished(family):
    case = CASES[family]
    model, inputs = case.make()
    expected = expected_maps(model, inputs, case, case.selection)
    with capture_maps(model, case.selection) as maps:
        for batch in (inputs, guided(inputs), inputs):
            model(**batch)
            torch.testing.assert_close(maps.take(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_several_images_of_each_prompt_are_not_taken_for_guidance():
    case = CASES["sd3"]
    model, inputs = case.make()
    inputs = repeated(inputs)
    with capture_maps(model, case.selection) as maps:
        with pytest.raises(
            ValueError,
            match=r"batch of 4 for a selection of 2 is assumed to be doubled .*images.*an entry for every",
        ):
            model(**inputs)
        assert not maps.ready
        index, weight = (x.repeat_interleave(2, dim=0) for x in (case.selection.index, case.selection.weight))
        maps.selection = selection = TokenSelection(index, weight)
        model(**inputs)
    torch.testing.assert_close(maps.value, expected_maps(model, inputs, case, selection), rtol=0, atol=1e-5)


@torch.no_grad()
def test_two_images_of_one_prompt_are_not_taken_for_guidance():
    case = CASES["sd3"]
    model, inputs = case.make()
    inputs["encoder_hidden_states"][1] = inputs["encoder_hidden_states"][0]
    one = TokenSelection(case.selection.index[:1], case.selection.weight[:1])
    with capture_maps(model, one), pytest.raises(ValueError, match="batch of 2 for a selection of 1"):
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("family", ["flux", "flux2", "qwen-image", "any-joint"])
def test_a_batch_of_a_family_that_does_not_double_it_is_never_halved(family):
    case = CASES[family]
    model, inputs = case.make()
    one = TokenSelection(case.selection.index[:1], case.selection.weight[:1])
    name = latent_name(inputs)
    inputs[name] = inputs[name][:1].expand_as(inputs[name])  # equal halves are no evidence of guidance here
    with (
        capture_maps(model, one, **case.options),
        pytest.raises(
            ValueError,
            match=r"batch of 1, the selection's \(.* needs cfg='last' or 'first'\), got 2; for several images",
        ),
    ):
        model(**inputs)


@torch.no_grad()
def test_any_other_batch_size_is_an_error():
    case = CASES["sd3"]
    model, inputs = case.make()
    with (
        capture_maps(model, case.selection),
        pytest.raises(ValueError, match=r"batch of 2, the selection's, or twice that for guidance, got 1"),
    ):
        model(**{name: value[:1] for name, value in inputs.items()})


@torch.no_grad()
def test_nan_in_the_latents_is_not_an_error():
    case = CASES["sd3"]
    model, inputs = case.make()
    inputs["hidden_states"][0, 0, 0, 0] = torch.nan
    with capture_maps(model, case.selection) as maps:
        model(**guided(inputs))
    assert maps.ready


class HostReads(TorchDispatchMode):
    """Records operators that read a value on the host, and so wait for the device of the tensor."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in HOST_READS:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(("cfg", "most"), [("last", 0), ("first", 0), ("auto", 1)])
def test_a_captured_pass_waits_for_the_device_only_to_compare_latents(cfg, most):
    case = CASES["sd3"]
    model, inputs = case.make()
    inputs, selection = guided(inputs), case.selection
    with HostReads() as plain:
        model(**inputs)
    with HostReads() as reads:
        handle = attach_maps(model, selection, cfg=cfg)
        handle.selection = selection.to("cpu").shift(0)
        model(**inputs)
        handle.take()
    handle.remove()
    assert len(reads.found) == len(plain.found) + most


def test_shift_to_and_among_empty_do_not_wait_for_the_device():
    selection = TokenSelection.from_positions([[3, 5], [4]])
    with HostReads() as reads:
        moved = selection.shift(7).to("meta").among_empty(1, 2).shift(-10)
    assert not reads.found
    assert (moved.first, moved.last, moved.batch) == (0, 2, 5)
    grown = selection.among_empty(1, 2)
    assert grown.index.tolist() == [[-1, -1], [3, 5], [4, -1], [-1, -1], [-1, -1]]
    assert grown.weight[:, 0].tolist() == [[0, 0], [1, 1], [1, 0], [0, 0], [0, 0]]
