"""Inputs of the tests of ``attention``: cases, random tensors, a textbook implementation, gradients, and views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from star_kernels import TokenSelection, attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IDS = ["float32", "float16", "bfloat16"]


@dataclass
class Case:
    """Shapes [B, H, Sq, Sk, D] and what is selected; ``positions`` as ``TokenSelection.from_positions`` takes them."""

    shape: tuple[int, int, int, int, int] = (2, 3, 63, 63, 32)
    positions: list = field(default_factory=lambda: [[5, 9, 40], [0]])
    rows: slice | tuple[int, int] | None = None
    masked: str = ""  # "some" keys, "text" keys among them, or "all" keys of the last sequence
    layout: str = "bhsd"
    reduce_heads: bool = True
    scale: float | None = None


CASES = {
    "plain": Case(),
    "one_query_one_key": Case((1, 1, 1, 1, 8), [[0]]),
    "one_key": Case((2, 2, 7, 1, 16), [[0], [0]]),
    "one_query": Case((1, 2, 1, 63, 16), [[62, 0]]),
    "head_dim_8": Case((1, 2, 33, 65, 8), [[64, 1]]),
    "head_dim_40": Case((1, 2, 33, 65, 40), [[64, 1]]),
    "head_dim_96": Case((1, 2, 33, 65, 96), [[64, 1]]),
    "head_dim_128": Case((1, 2, 130, 129, 128), [[128, 127, 0]]),
    "head_dim_odd": Case((1, 2, 19, 21, 13), [[20, 1]]),
    "parallel": Case((2, 4, 300, 300, 32), [list(range(16)), [7, 299]], reduce_heads=True),  # work for two threads
    "thousand": Case((1, 1, 1000, 1000, 24), [[999, 998, 0]], rows=slice(3, 997)),
    "joint_1357": Case((1, 1, 1357, 1357, 64), [[1024, 1030, 1356]], rows=(0, 1024)),
    "cross": Case((2, 3, 100, 37, 32), [[36, 2], [1]]),
    "cross_long": Case((2, 3, 5, 300, 32), [[299, 2], [1]]),
    "bshd": Case(layout="bshd"),
    "bshd_per_head": Case(layout="bshd", reduce_heads=False, rows=(1, 60)),
    "phrases": Case(positions=[[[5], [9, 40], [1, 2, 3]], [[], [62], [0, 0]]]),
    "phrases_per_head": Case(positions=[[[5], [9, 40]], [[], [62]]], reduce_heads=False),
    "all_slots_empty": Case(positions=[[], []]),
    "one_sequence_empty": Case(positions=[[3], []]),
    "repeated_tokens": Case(positions=[[7, 7, 7], [1, 2, 1]]),
    "forty_tokens": Case(positions=[list(range(40)), list(range(20, 60))]),
    "every_token": Case((1, 2, 40, 35, 16), [list(range(35))]),
    "rows_slice": Case(rows=slice(10, 47)),
    "rows_open_slice": Case(rows=slice(-20, None)),
    "rows_tuple": Case(rows=(61, 2)),
    "one_row": Case(rows=(31, 1), reduce_heads=False),
    "mask_some": Case(masked="some"),
    "mask_selected": Case(masked="text", rows=(1, 50)),
    "mask_all": Case(masked="all", reduce_heads=False),
    "scale": Case(scale=0.5),
    "scale_zero": Case(scale=0.0),
    "scale_negative": Case(scale=-0.3),
}


@dataclass
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    selection: TokenSelection
    key_mask: Tensor | None
    options: dict

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def make(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    batch, heads, queries, keys, width = case.shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, heads, n, width) for n in (queries, keys, keys)]
    if case.layout == "bshd":
        sizes = [(b, s, h, d) for b, h, s, d in sizes]
    tensors = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    selection = TokenSelection.from_positions(case.positions)
    weight = selection.weight * (0.25 + torch.rand(selection.weight.shape, generator=generator))
    weight = weight.masked_fill((selection.index == -1)[:, None], 9.0)  # the weight of an empty slot counts for nothing
    selection = TokenSelection(selection.index, weight).to(device)
    mask = None
    if case.masked:
        mask = torch.rand(batch, keys, generator=generator) < 0.7
        mask[:, 0] = True
        if case.masked == "text":
            mask[0, selection.index[0, :1].long()] = False
        if case.masked == "all":
            mask[-1] = False
        mask = mask.to(device)
    options = {"rows": case.rows, "layout": case.layout, "reduce_heads": case.reduce_heads, "scale": case.scale}
    return Inputs(*tensors, selection, mask, options)


def textbook(
    query: Tensor, key: Tensor, value: Tensor, selection: TokenSelection, key_mask: Tensor | None, options: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, maps and log-sum-exp from a materialised softmax and one weight for each key, in the inputs' dtype."""
    if options["layout"] == "bshd":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    keys, width = key.shape[2:]
    scale = width**-0.5 if options["scale"] is None else options["scale"]
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    attends = torch.ones_like(scores, dtype=torch.bool)
    if key_mask is not None:
        attends = attends & key_mask[:, None, None]
    some = attends.any(dim=-1)
    # Rows without any key get finite scores first, so that no gradient is NaN, and the stated results afterwards.
    scores = scores.masked_fill(~attends, -torch.inf).masked_fill(~some[..., None], 0.0)
    probability = torch.softmax(scores, dim=-1) * some[..., None]
    lse = torch.logsumexp(scores, dim=-1).masked_fill(~some, -torch.inf)
    out = torch.matmul(probability, value)

    batch, phrases, slots = selection.weight.shape
    per_key = torch.zeros(batch, phrases, keys + 1, dtype=torch.float64, device=query.device)
    for b in range(batch):
        for t in range(slots):
            per_key[b, :, selection.index[b, t]] += selection.weight[b, :, t]  # empty slots land in the last column
    maps = torch.einsum("bhqk,bgk->bghq", probability, per_key[..., :keys].to(query.dtype))
    rows = options["rows"]
    if rows is not None:
        maps = maps[..., rows if isinstance(rows, slice) else slice(rows[0], sum(rows))]
    maps = maps.mean(dim=2) if options["reduce_heads"] else maps
    return (out.transpose(1, 2) if options["layout"] == "bshd" else out), maps, lse


def run(inputs: Inputs, backend: str, tensors: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    result = attention(
        *(tensors or inputs.tensors),
        inputs.selection,
        key_mask=inputs.key_mask,
        return_lse=True,
        backend=backend,
        **inputs.options,
    )
    return tuple(result)


def cotangents(results: tuple[Tensor, ...], wanted: str) -> list[Tensor]:
    """A random gradient for each wanted result; zero where the log-sum-exp is -inf, which has none."""
    generator = torch.Generator().manual_seed(1)
    random = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device) for r in results]
    random[2] = random[2].masked_fill(results[2].detach() == -torch.inf, 0.0)
    # The float32 and float64 variants get the same numbers: those of the narrowest dtype.
    return [g.bfloat16().double() if n in wanted else None for g, n in zip(random, ("out", "maps", "lse"), strict=True)]


def gradients(function: Callable, inputs: Inputs, dtype: torch.dtype, wanted: str) -> list[Tensor]:
    """Gradients in query, key and value of the wanted results of ``function(tensors)``."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in inputs.tensors]
    results = function(tuple(leaves))
    pairs = [(r, g.to(r.dtype)) for r, g in zip(results, cotangents(results, wanted), strict=True) if g is not None]
    grads = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def textbook_of(inputs: Inputs, dtype: torch.dtype) -> Callable:
    return lambda tensors: textbook(*(t.to(dtype) for t in tensors), inputs.selection, inputs.key_mask, inputs.options)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:2], 2 * t.shape[2], t.shape[3] + 5), torch.nan, dtype=t.dtype, device=t.device)
    view = wide[:, :, ::2, 2:-3]
    view.copy_(t)
    return view


def last_dimension_strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0]


def last_dimension_first(t: Tensor) -> Tensor:
    return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def expanded_heads(t: Tensor) -> Tensor:
    return t[:, :1].expand(t.shape)


def expanded_rows(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :1].expand(t.shape)


def overlapping(t: Tensor) -> Tensor:
    """Rows that are windows of one sequence, each one element after the last."""
    return torch.nn.functional.pad(t[..., 0], (0, t.shape[3] - 1), value=0.5).unfold(-1, t.shape[3], 1)


EXPANDED = [expanded, expanded_heads, expanded_rows, overlapping]
VIEWS = [transposed, sliced, last_dimension_strided, last_dimension_first, *EXPANDED]
