"""The operators for statistics of attention over all pairs of a row and a key: log-sum-exp, entropy and column sums.

A kernel computes each in one pass, without the matrix of probabilities. Gradients, and results where there is no
kernel, are matrix products in PyTorch over ranges of rows: of a range, at most 64 MiB of scores are materialised at a
time. In both passes the work is that of the scores, Q K^T, of all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.attention import dispatch, naive
from star_kernels.attention.checks import check_attn_mask, check_like, check_lse, check_qkv
from star_kernels.attention.layouts import unit_strides
from star_kernels.attention.masks import expanded
from star_kernels.operators import Operator

SCORES = 1 << 24  # elements of the scores of a range of rows


def rows(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy, float32 [B, H, R], of the rows of query [B, H, R, D]."""
    kernel = dispatch.statistics_kernel(query)
    if kernel == "triton":
        from star_kernels.attention import triton_statistics

        return triton_statistics.attention_rows(query, key, mask, scale)
    lse, entropy = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    if kernel == "naive":
        for part in _ranges(query, key):
            lse[:, :, part], entropy[:, :, part] = naive.rows(query[:, :, part], key, _of_rows(mask, part), scale)
        return lse, entropy
    query, key = unit_strides(query, key)
    native.cpu().attention_rows(query, key, _expanded(mask, query, key), scale, native.threads(), lse, entropy)
    return lse, entropy


def columns(query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Sums of the probabilities of each key over the rows of query, float32 [B, H, Sk]."""
    kernel = dispatch.statistics_kernel(query)
    if kernel == "triton":
        from star_kernels.attention import triton_statistics

        return triton_statistics.attention_columns(query, key, lse, mask, scale)
    sums = query.new_zeros(key.shape[:3], dtype=torch.float32)
    if kernel == "naive":
        for part in _ranges(query, key):
            sums += naive.columns(query[:, :, part], key, lse[:, :, part], _of_rows(mask, part), scale)
        return sums
    query, key = unit_strides(query, key)
    mask = _expanded(mask, query, key)
    native.cpu().attention_columns(query, key, lse.contiguous(), mask, scale, native.threads(), sums)
    return sums


def rows_backward(
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    entropy: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dS = P (dlse - dH (log P + H))."""
    grads = _Gradients(query, key)
    for part, log in _logarithms(query, key, lse, mask, scale):
        probability = log.exp()
        change = torch.zeros((), device=log.device) if grad_lse is None else grad_lse[:, :, part, None]
        if grad_entropy is not None:
            log = log.masked_fill_(probability == 0.0, 0.0).add_(entropy[:, :, part, None])
            change = change - log.mul_(grad_entropy[:, :, part, None])
        grads.add(part, probability * change, scale)
    return grads.results()


def columns_backward(
    grad_sums: Tensor, query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dS = P dsums, and dlse = -sum_k dS."""
    grads = _Gradients(query, key)
    grad_lse = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    for part, log in _logarithms(query, key, lse, mask, scale):
        grad_scores = log.exp_().mul_(grad_sums[:, :, None])
        grad_lse[:, :, part] = -grad_scores.sum(dim=-1)
        grads.add(part, grad_scores, scale)
    return *grads.results(), grad_lse


class _Gradients:
    """Gradients of query and key, from those of the scores of ranges of rows."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.inputs = query, key
        self.query, self.key = (torch.empty_like(query), torch.zeros(key.shape, device=key.device))

    def add(self, part: slice, grad_scores: Tensor, scale: float) -> None:
        query, key = self.inputs
        grad_scores = grad_scores.mul_(scale)
        self.query[:, :, part] = torch.matmul(grad_scores, key.float())
        self.key += torch.matmul(grad_scores.mT, query[:, :, part].float())

    def results(self) -> tuple[Tensor, Tensor]:
        return self.query, torch.empty_like(self.inputs[1]).copy_(self.key)


def _logarithms(
    query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of rows, and the logarithms of their probabilities in float32: -inf for pairs that do not take part."""
    keys = key.float().mT
    for part in _ranges(query, key):
        normaliser = lse[:, :, part, None]
        log = torch.matmul(query[:, :, part].float(), keys).mul_(scale)
        log -= normaliser.masked_fill(normaliser == float("-inf"), float("inf"))
        pairs = _of_rows(mask, part)
        if pairs is not None:
            log.masked_fill_(~pairs, float("-inf"))
        yield part, log


def _ranges(query: Tensor, key: Tensor) -> Iterator[slice]:
    batch, heads, count, _ = query.shape
    step = max(1, SCORES // (batch * heads * key.shape[2]))
    return (slice(first, min(count, first + step)) for first in range(0, count, step))


def _of_rows(mask: Tensor | None, part: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]


def _expanded(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    return None if mask is None else expanded(mask, query, key.shape[2])


def _rows_fake(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return lse, torch.empty_like(lse)


def _columns_fake(query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty(key.shape[:3], dtype=torch.float32)


def _rows_backward_fake(
    grad_lse: Tensor | None, grad_entropy: Tensor | None, query: Tensor, key: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


def _columns_backward_fake(
    grad_sums: Tensor, query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), lse.new_empty(lse.shape)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, mask, ctx.scale = inputs
    ctx.save_for_backward(query, key, *output, mask)
    ctx.set_materialize_grads(False)


def _differentiate_rows(ctx: Any, grad_lse: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_lse is None and grad_entropy is None:
        return (None,) * 4
    return (*ATTENTION_ROWS_BACKWARD(grad_lse, grad_entropy, *ctx.saved_tensors, ctx.scale), None, None)


def _save_columns(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_columns(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    return (*ATTENTION_COLUMNS_BACKWARD(grad_sums, *ctx.saved_tensors, ctx.scale), None, None)


def _check(query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    check_qkv(query, key, key, 2)
    if query.dtype == torch.float64:
        raise TypeError("query must be float32, float16 or bfloat16, got torch.float64")
    check_attn_mask(mask, query, key.shape[2])


def _check_rows(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
    _check(query, key, mask)


def _check_rows_backward(
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    entropy: Tensor,
    mask: Tensor | None,
    scale: float,
) -> None:
    _check(query, key, mask)
    of_rows = {"lse": lse, "entropy": entropy, "grad_lse": grad_lse, "grad_entropy": grad_entropy}
    for name, tensor in of_rows.items():
        check_like(name, tensor, query.shape[:3], torch.float32, query)


def _check_columns(query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scale: float) -> None:
    _check(query, key, mask)
    check_lse(lse, query)


def _check_columns_backward(
    grad_sums: Tensor, query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> None:
    _check_columns(query, key, lse, mask, scale)
    check_like("grad_sums", grad_sums, key.shape[:3], torch.float32, query)


# Backward operators come first: the gradients of the forward operators refer to them.
ATTENTION_ROWS_BACKWARD = Operator(
    "attention_rows_backward(Tensor? grad_lse, Tensor? grad_entropy, Tensor query, Tensor key, Tensor lse, "
    "Tensor entropy, Tensor? attn_mask, float scale) -> (Tensor grad_query, Tensor grad_key)",
    rows_backward,
    _rows_backward_fake,
    check=_check_rows_backward,
)
ATTENTION_ROWS = Operator(
    "attention_rows(Tensor query, Tensor key, Tensor? attn_mask, float scale) -> (Tensor lse, Tensor entropy)",
    rows,
    _rows_fake,
    check=_check_rows,
    setup_context=_save_rows,
    backward=_differentiate_rows,
)
ATTENTION_COLUMNS_BACKWARD = Operator(
    "attention_columns_backward(Tensor grad_sums, Tensor query, Tensor key, Tensor lse, Tensor? attn_mask, "
    "float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_lse)",
    columns_backward,
    _columns_backward_fake,
    check=_check_columns_backward,
)
ATTENTION_COLUMNS = Operator(
    "attention_columns(Tensor query, Tensor key, Tensor lse, Tensor? attn_mask, float scale) -> Tensor",
    columns,
    _columns_fake,
    check=_check_columns,
    setup_context=_save_columns,
    backward=_differentiate_columns,
)
