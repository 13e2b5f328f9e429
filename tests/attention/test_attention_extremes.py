"""Attention and its maps with extreme values, and with NaN or infinity in one sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import TokenSelection, attention, attention_maps

BATCH, HEADS, QUERIES, KEYS, WIDTH = 3, 2, 70, 45, 16
OTHERS = [0, 2]
BROKEN = [torch.nan, torch.inf, -torch.inf]
DIRECTIONS = ["image_to_text", "text_to_image"]
ORDER = torch.tensor([2, 0, 1])


class Inputs:
    """Queries, keys and values, and selected tokens of both in two phrases."""

    def __init__(self, device: str, size: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.device = device
        self.query, self.key, self.value = (
            factor * normal(BATCH, HEADS, n, WIDTH) for n, factor in ((QUERIES, size), (KEYS, 1.0), (KEYS, 1.0))
        )
        scores = torch.matmul(self.query.double(), self.key.double().transpose(-1, -2)) * WIDTH**-0.5
        self.probability = torch.softmax(scores, dim=-1)  # [B, H, Sq, Sk]
        self.lse = torch.logsumexp(scores, dim=-1).float()
        index = torch.randint(0, KEYS, (BATCH, 9), generator=generator, dtype=torch.int32)
        index[0, 3:] = -1
        weight = torch.rand(BATCH, 2, 9, generator=generator) * (torch.rand(BATCH, 2, 9, generator=generator) < 0.6)
        self.selection = TokenSelection(index, weight)

    def attention(self, backend: str, **changed: Any) -> tuple[Tensor, ...]:
        """Out, maps, lse and the gradients of query, key and value."""
        tensors = {name: changed.get(name, getattr(self, name)) for name in ("query", "key", "value")}
        leaves = [t.to(self.device).detach().requires_grad_() for t in tensors.values()]
        selection = changed.get("selection", self.selection).to(self.device)
        out, maps, lse = attention(*leaves, selection, return_lse=True, backend=backend)
        gradients = torch.autograd.grad(out.square().sum() + maps.sum() + lse.sum(), leaves)
        return tuple(t.detach() for t in (out, maps, lse, *gradients))

    def maps(self, backend: str, direction: str, **changed: Any) -> tuple[Tensor, ...]:
        """The maps and the gradients of query, key and lse."""
        tensors = {name: changed.get(name, getattr(self, name)) for name in ("query", "key", "lse")}
        leaves = [t.to(self.device).detach().requires_grad_() for t in tensors.values()]
        selection = changed.get("selection", self.selection).to(self.device)
        maps = attention_maps(*leaves, selection, direction=direction, backend=backend)
        return maps.detach(), *torch.autograd.grad(maps.square().sum(), leaves)


def broken(tensor: Tensor, value: float) -> Tensor:
    """The tensor with one element of its second sample replaced."""
    spoilt = tensor.clone()
    spoilt[1].view(-1)[5] = value
    return spoilt


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...], samples: list[int]) -> bool:
    return all(torch.equal(a[samples], b[samples]) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("value", BROKEN, ids=str)
def test_nan_or_infinity_in_a_sample_affects_no_other(value: float, attention_backend: tuple[str, str]) -> None:
    inputs = Inputs(attention_backend[1])
    clean = inputs.attention(attention_backend[0])
    for name in ("query", "key", "value"):
        results = inputs.attention(attention_backend[0], **{name: broken(getattr(inputs, name), value)})
        assert equal(results, clean, OTHERS), name
        assert not bool(results[0][1].isfinite().all()), name


@pytest.mark.parametrize("value", BROKEN, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_or_infinity_in_a_sample_affects_maps_of_no_other(
    direction: str, value: float, maps_backend: tuple[str, str]
) -> None:
    inputs = Inputs(maps_backend[1])
    clean = inputs.maps(maps_backend[0], direction)
    for name in ("query", "key", "lse"):
        results = inputs.maps(maps_backend[0], direction, **{name: broken(getattr(inputs, name), value)})
        assert equal(results, clean, OTHERS), name


def test_nan_in_a_row_affects_maps_of_no_other_row(maps_backend: tuple[str, str]) -> None:
    inputs = Inputs(maps_backend[1])
    clean = inputs.maps(maps_backend[0], "image_to_text")[0]
    query = inputs.query.clone()
    query[1, 0, 33] = torch.nan
    maps = inputs.maps(maps_backend[0], "image_to_text", query=query)[0]
    rest = [r for r in range(QUERIES) if r != 33]
    assert torch.equal(maps[:, :, rest], clean[:, :, rest])
    assert bool(maps[1, :, 33].isnan().all())


@pytest.mark.parametrize("size", [1e2, 3e3, 1e4])
def test_logits_of_ten_thousand_give_the_softmax(size: float, attention_backend: tuple[str, str]) -> None:
    inputs = Inputs(attention_backend[1], size)
    everything = TokenSelection.from_mask(torch.ones(BATCH, KEYS, dtype=torch.bool))
    assert float(inputs.lse.abs().max()) > size
    out, maps, lse, *gradients = inputs.attention(attention_backend[0], selection=everything)
    # The rounding error of a float32 score of that size is also that of the logarithm of its probability.
    error = 4 * size * torch.finfo(torch.float32).eps * WIDTH**0.5
    exact = torch.matmul(inputs.probability, inputs.value.double())
    torch.testing.assert_close(out.double().cpu(), exact, rtol=0, atol=error)
    torch.testing.assert_close(lse.cpu(), inputs.lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(maps, torch.ones_like(maps), rtol=0, atol=error)
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_maps_of_logits_of_ten_thousand_are_those_of_the_softmax(
    direction: str, size: float, maps_backend: tuple[str, str]
) -> None:
    inputs = Inputs(maps_backend[1], size)
    selection = TokenSelection.from_positions([[[3], [40, 7]]] * BATCH)
    maps = inputs.maps(maps_backend[0], direction, selection=selection)[0].double().cpu()
    probability = inputs.probability.mean(dim=1)
    if direction == "text_to_image":
        probability = probability.transpose(1, 2)
    exact = torch.stack([probability[..., 3], probability[..., 40] + probability[..., 7]], dim=1)
    torch.testing.assert_close(maps, exact, rtol=0, atol=4 * size * torch.finfo(torch.float32).eps * WIDTH**0.5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_log_sum_exp_that_is_too_small_gives_infinity_and_never_a_plausible_number(
    direction: str, maps_backend: tuple[str, str]
) -> None:
    inputs = Inputs(maps_backend[1])
    selection = TokenSelection.from_positions([[3]] * BATCH)
    lse = inputs.lse.clone()
    lse[1] = -1e4
    clean = inputs.maps(maps_backend[0], direction, selection=selection)[0]
    maps = inputs.maps(maps_backend[0], direction, selection=selection, lse=lse)[0]
    assert torch.equal(maps[OTHERS], clean[OTHERS])
    assert bool((maps[1] == torch.inf).all())
    lse[1] = 1e4
    assert not inputs.maps(maps_backend[0], direction, selection=selection, lse=lse)[0][1].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_empty_selection_gives_zeros_and_no_gradient(direction: str, maps_backend: tuple[str, str]) -> None:
    inputs = Inputs(maps_backend[1])
    empty = TokenSelection.from_positions([[]] * BATCH)
    for tensor in inputs.maps(maps_backend[0], direction, selection=empty):
        assert not tensor.any()


def test_attention_with_an_empty_selection_is_attention(attention_backend: tuple[str, str]) -> None:
    inputs = Inputs(attention_backend[1])
    results = inputs.attention(attention_backend[0], selection=TokenSelection.from_positions([[]] * BATCH))
    assert not results[1].any()
    exact = torch.matmul(inputs.probability, inputs.value.double())
    torch.testing.assert_close(results[0].double().cpu(), exact, rtol=0, atol=1e-5)


def test_maps_of_all_keys_sum_to_one_over_phrases(attention_backend: tuple[str, str]) -> None:
    """Between 0 and the sum of the weights; over all keys, in any number of phrases, they sum to one."""
    inputs = Inputs(attention_backend[1])
    maps = inputs.attention(attention_backend[0])[1].cpu()
    used = inputs.selection.weight * (inputs.selection.index >= 0)[:, None]
    assert bool((maps >= 0).all())
    assert bool((maps <= used.sum(dim=2)[..., None] * (1 + 1e-5)).all())
    phrases = [[list(range(g, KEYS, 4)) for g in range(4)]] * BATCH
    maps = inputs.attention(attention_backend[0], selection=TokenSelection.from_positions(phrases))[1]
    torch.testing.assert_close(maps.sum(dim=1), torch.ones_like(maps[:, 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_samples_are_independent(direction: str, maps_backend: tuple[str, str]) -> None:
    inputs = Inputs(maps_backend[1])
    results = inputs.maps(maps_backend[0], direction)
    chosen = inputs.selection
    moved = {name: getattr(inputs, name)[ORDER] for name in ("query", "key", "lse")}
    selection = TokenSelection(chosen.index[ORDER], chosen.weight[ORDER])
    for got, want in zip(inputs.maps(maps_backend[0], direction, selection=selection, **moved), results, strict=True):
        if maps_backend[0] == "naive":  # the order of a sum in a matrix product may depend on the sample
            torch.testing.assert_close(got, want[ORDER], rtol=1e-6, atol=1e-7)
        else:
            torch.testing.assert_close(got, want[ORDER], rtol=0, atol=0)


@pytest.mark.parametrize("factor", [2.0, 0.25, 2.0**-100])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_maps_are_linear_in_the_weights(direction: str, factor: float, maps_backend: tuple[str, str]) -> None:
    inputs = Inputs(maps_backend[1])
    chosen = inputs.selection
    one = inputs.maps(maps_backend[0], direction)[0]
    scaled = inputs.maps(maps_backend[0], direction, selection=TokenSelection(chosen.index, factor * chosen.weight))[0]
    torch.testing.assert_close(scaled / factor, one, rtol=1e-6, atol=0)
