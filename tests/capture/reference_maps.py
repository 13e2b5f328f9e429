"""Reference maps: a materialised softmax over the queries and keys of the attention calls in a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import COLUMNS, ROWS, Case
from torch import Tensor

from star_kernels import TokenSelection

Call = tuple[Tensor, Tensor, Tensor | None]  # query, key, mask


def attention_calls(model: Any, inputs: dict[str, Any]) -> list[Call]:
    """Every attention call of a forward pass, in order."""
    calls: list[Call] = []
    original = F.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        calls.append((query, key, attn_mask))
        return original(query, key, value, attn_mask=attn_mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", record)
        model(**inputs)
    return calls


def map_of(call: Call, selection: TokenSelection, rows: tuple[int, int] | None = None) -> Tensor:
    """``[B, G, R]`` in the dtype of the call."""
    query, key, mask = call
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    attention = scores.softmax(dim=-1).mean(dim=1)  # [B, Sq, Sk]
    maps = []
    for b in range(len(query)):
        used = selection.index[b] >= 0
        maps.append(selection.weight[b][:, used].to(query.dtype) @ attention[b].mT[selection.index[b][used].long()])
    found = torch.stack(maps)
    return found if rows is None else found[..., rows[0] : sum(rows)]


def expected_maps(
    model: Any, inputs: dict[str, Any], case: Case, selection: TokenSelection, blocks: Sequence[int] | None = None
) -> Tensor:
    """``[B, G, h, w]``, of a video ``[B, G, f, h, w]``: the mean over the blocks, on the finest grid.

    The selection has positions of the text.
    """
    selection = selection.shift(case.text)
    calls = [call for call in attention_calls(model, inputs) if call[1].shape[2] == case.keys]
    parts = []
    for block in range(len(calls)) if blocks is None else blocks:
        query = calls[block][0]
        if case.rows[1] <= query.shape[2]:
            part = map_of(calls[block], selection, case.rows).unflatten(-1, case.grid)
        else:  # a coarser level of a UNet
            coarse = map_of(calls[block], selection).unflatten(-1, (ROWS // 2, COLUMNS // 2))
            part = F.interpolate(coarse, (ROWS, COLUMNS), mode="bilinear")
        parts.append(part)
    return torch.stack(parts).mean(dim=0)
