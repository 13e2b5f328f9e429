"""Inputs of the Triton kernels' tests, the reference in plain PyTorch, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from star_kernels.attention import naive
from star_kernels.attention.arguments import MapArguments


@dataclass(frozen=True)
class Case:
    """Shape [B, H, Sq, Sk, D]; T slots, G phrases; ``masked``: "some" keys, or "all" of the last sequence."""

    shape: tuple[int, int, int, int, int] = (1, 2, 63, 63, 32)
    slots: int = 3
    phrases: int = 1
    rows: tuple[int, int] | None = None
    masked: str = ""
    reduce_heads: bool = True
    scale: float = 0.2


CASES = {
    "plain": Case(),
    "one": Case((1, 1, 1, 1, 8), slots=1),
    "full_tiles": Case((1, 2, 64, 64, 32)),
    "cross": Case((2, 3, 40, 70, 32)),
    "cross_short": Case((1, 2, 130, 5, 32), rows=(1, 128)),
    "head_dim_13": Case((1, 2, 20, 33, 13)),
    "head_dim_40": Case((1, 2, 33, 65, 40)),
    "head_dim_64": Case((1, 2, 33, 65, 64)),
    "head_dim_72": Case((1, 2, 33, 40, 72)),
    "head_dim_128": Case((1, 2, 33, 40, 128)),
    "phrases": Case(phrases=3, slots=5),
    "six_phrases_of_forty": Case(phrases=6, slots=40, masked="some"),
    "per_head": Case((2, 2, 63, 63, 32), phrases=2, reduce_heads=False),
    "rows": Case((2, 3, 100, 40, 32), rows=(37, 30)),
    "one_row": Case((1, 20, 40, 40, 16), rows=(33, 1)),
    "mask_some": Case((2, 2, 63, 63, 32), masked="some"),
    "mask_all": Case((2, 2, 40, 64, 32), phrases=2, masked="all", reduce_heads=False),
    "scale_zero": Case(scale=0.0),
    "scale_negative": Case(scale=-0.3),
}


@dataclass
class Inputs:
    tensors: tuple[Tensor, Tensor, Tensor]
    index: Tensor
    weight: Tensor
    key_mask: Tensor | None
    rows: tuple[int, int]
    case: Case

    @property
    def arguments(self) -> MapArguments:
        return MapArguments(self.index, self.weight, self.key_mask, *self.rows, self.case.scale, self.case.reduce_heads)


def make(case: Case, dtype: torch.dtype) -> Inputs:
    batch, heads, queries, keys, width = case.shape
    tensors = tuple(torch.randn(batch, heads, n, width).to(dtype) for n in (queries, keys, keys))
    index = torch.randint(0, keys, (batch, case.slots), dtype=torch.int32)  # may repeat
    if case.slots > 1:
        index[0, 1] = -1
    key_mask = None
    if case.masked:
        key_mask = torch.rand(batch, keys) < 0.7
        key_mask[:, 0] = True
        key_mask[0, index[0, :1].long()] = False  # a selected token among them
        if case.masked == "all":
            key_mask[-1] = False
    weight = 0.1 + torch.rand(batch, case.phrases, case.slots)
    return Inputs(tensors, index, weight, key_mask, case.rows or (0, queries), case)


def eager(query: Tensor, key: Tensor, value: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The reference in the dtype of the inputs, without its conversion to float32."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * inputs.case.scale
    if inputs.key_mask is not None:
        some = inputs.key_mask.any(dim=1)[:, None, None, None]
        scores = scores.masked_fill(~inputs.key_mask[:, None, None], -torch.inf).masked_fill(~some, 0.0)
    probability = torch.softmax(scores, dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    if inputs.key_mask is not None:
        probability, lse = probability * some, lse.masked_fill(~some[..., 0], -torch.inf)
    start, length = inputs.rows
    positions = inputs.index.clamp(min=0).long()[:, None, None].expand(-1, query.shape[1], length, -1)
    selected = probability[:, :, start : start + length].gather(3, positions)
    selected = selected.masked_fill((inputs.index == -1)[:, None, None], 0.0)
    maps = torch.einsum("bhrt,bgt->bghr", selected, inputs.weight.to(query.dtype))
    return torch.matmul(probability, value), maps.mean(dim=2) if inputs.case.reduce_heads else maps, lse


def exact(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return naive.attention(*(t.double() for t in inputs.tensors), inputs.arguments)


def cotangents(inputs: Inputs, wanted: str) -> list[Tensor | None]:
    """Random gradients of out, maps and lse, exact in every dtype; None where not wanted."""
    results = exact(inputs)
    random = [torch.randn(r.shape).to(inputs.tensors[0].dtype).double() for r in results]
    random[2] = random[2].masked_fill(results[2] == -torch.inf, 0.0)
    return [g if name in wanted else None for g, name in zip(random, ("out", "maps", "lse"), strict=True)]


def autograd(
    function: Callable, inputs: Inputs, dtype: torch.dtype, upstream: list[Tensor | None]
) -> tuple[Tensor, ...]:
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs.tensors]
    pairs = [(r, g.to(r.dtype)) for r, g in zip(function(*leaves), upstream, strict=True) if g is not None]
    grads = torch.autograd.grad([r for r, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))


def exact_lse(inputs: Inputs, attn_mask: Tensor | None = None) -> Tensor:
    scores = torch.matmul(inputs.tensors[0].double(), inputs.tensors[1].double().transpose(-1, -2)) * inputs.case.scale
    if inputs.key_mask is not None:
        scores = scores.masked_fill(~inputs.key_mask[:, None, None], -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return torch.logsumexp(scores, dim=-1)


def bshd(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def packed(t: Tensor) -> Tensor:
    return torch.stack([t, t], dim=3).flatten(3)[..., : t.shape[3]]


def strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, dim=3)[..., ::2]


def misaligned(t: Tensor) -> Tensor:
    return torch.cat([t[..., :1], t], dim=3).transpose(1, 2).contiguous().transpose(1, 2)[..., 1:]
