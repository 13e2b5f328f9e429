"""Masks of attention backends: captured maps follow what the backend makes of them."""

import pytest
import torch

pytest.importorskip("diffusers")

from dispatched import BATCH, LENGTH, ROWS, Model, captured, padding, stand_ins
from reference_maps import map_of

from star_kernels import TokenSelection


@pytest.fixture(autouse=True)
def packages():
    with stand_ins():
        yield


@pytest.fixture
def selection():
    return TokenSelection.from_positions([[0, 1], [2]])


# What each backend makes of a bool mask [B, Sk] of padded keys, in the form that it accepts.
PADDED = {
    "flash_varlen": lambda m: m,
    "flash_varlen_hub": lambda m: m,
    "_flash_varlen_3": lambda m: m[:, None],
    "_flash_3_varlen_hub": lambda m: m[:, None, None],
    "sage_varlen": lambda m: m,
    "xformers": lambda m: m,
    "flex": lambda m: m[:, None, None],
    "_native_math": lambda m: m[:, None, None],
}


@torch.no_grad()
@pytest.mark.parametrize("name", PADDED)
def test_a_mask_of_keys_is_followed(name, selection):
    model = Model(name)
    mask = PADDED[name](padding())
    expected = model(attn_mask=mask)
    out, maps = captured(model, selection, attn_mask=mask)
    assert torch.equal(out, expected)
    call = model.call(padding()[:, None, None])
    torch.testing.assert_close(maps, map_of(call, selection, ROWS["rows"]), rtol=0, atol=1e-6)


def holes():
    return torch.arange(LENGTH) % 3 != torch.tensor([[0], [1]])


def by_query():
    return (torch.ones(BATCH, 1, LENGTH, LENGTH).tril(2) > 0) & padding()[:, None, None]


# Masks that backends read in a way of their own: the mask that is given, and the one that is applied.
READINGS = {
    "only the number of keys": ("flash_varlen", holes(), (torch.arange(LENGTH) < holes().sum(1, True))[:, None, None]),
    "packed keys": ("flash_varlen_hub", holes(), holes()[:, None, None]),
    "what any query attends to": ("_flash_3_varlen_hub", by_query(), by_query().any(dim=2, keepdim=True)),
    "a mask of queries": ("flex", padding(), padding()[:, None, :, None].expand(-1, 1, -1, LENGTH)),
    "each query, flex": ("flex", by_query(), by_query()),
    "each query, PyTorch": ("_native_math", by_query(), by_query()),
    "each query, without a batch": ("_native_math", by_query()[1, 0], by_query()[1:]),
    "each query, xformers": ("xformers", torch.where(by_query(), 0.0, -torch.inf), by_query()),
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "given", "applied"), READINGS.values(), ids=READINGS)
def test_the_maps_follow_the_backends_reading_of_a_mask(name, given, applied, selection):
    model = Model(name)
    expected = model(attn_mask=given)
    torch.testing.assert_close(expected, model.exact(applied))
    out, maps = captured(model, selection, attn_mask=given)
    assert torch.equal(out, expected)
    reference = map_of(model.call(applied), selection, ROWS["rows"]).nan_to_num()  # of rows without any key
    torch.testing.assert_close(maps, reference, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_block_mask_is_followed(selection):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: k <= q + b, BATCH, None, LENGTH, LENGTH, "cpu")
    model = Model("flex")
    expected = model(attn_mask=mask)
    out, maps = captured(model, selection, attn_mask=mask)
    assert torch.equal(out, expected)
    applied = torch.arange(LENGTH) <= torch.arange(LENGTH)[:, None] + torch.arange(BATCH)[:, None, None, None]
    torch.testing.assert_close(maps, map_of(model.call(applied), selection, ROWS["rows"]), rtol=0, atol=1e-6)
