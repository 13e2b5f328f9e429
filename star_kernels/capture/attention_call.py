"""An attention call of a captured processor: its output and its maps.

:func:`star_kernels.attention` computes both for ``F.scaled_dot_product_attention``. For another attention backend of
diffusers, and for masks that differ by query, the function that the processor called computes the output, and the maps
are computed beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from star_kernels.attention import attention, attention_maps
from star_kernels.capture import masks
from star_kernels.capture.averages import keeps_heads
from star_kernels.capture.backends import BACKENDS, Backend, unusual
from star_kernels.capture.biased_maps import biased_maps
from star_kernels.capture.passes import ForwardPass
from star_kernels.capture.transforms import backend_for
from star_kernels.checks import warn
from star_kernels.torch_internals import WATCH, constant_in_graph

OUTPUTS = ("auto", "model", "ours")


class Call(NamedTuple):
    """The arguments of an attention call, as for ``F.scaled_dot_product_attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, Sq, Sk]"""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[2]


def attention_with_maps(
    name: str,
    forward_pass: ForwardPass,
    detach: bool,
    output: str,
    function: Any,
    backend: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Tensor]:
    """The output of an attention call of ``name``, and its maps, ``[batch, G, R]`` or ``[batch, G, H, R]``.

    Args:
        detach: whether the maps are constants.
        output: what computes the output, see :func:`star_kernels.capture.attach_maps`.
        function: the function that was called, with ``args`` and ``kwargs``.
        backend: the attention backend of diffusers that it is; None for ``F.scaled_dot_product_attention``.
    """
    row = None if backend is None else BACKENDS.get(backend, Backend(backend, None, mask="unknown"))
    call = Call(*args, **kwargs) if row is None else _of_backend(name, row, kwargs)
    shape = batch, heads, _, keys = call.shape
    _check(name, forward_pass, call, shape)
    if (call.enable_gqa or row is not None) and call.key.shape[1] != heads:
        repeats = heads // call.key.shape[1]
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (call.key, call.value))
        call = call._replace(key=key, value=value)
    mask = call.attn_mask
    if mask is not None:
        mask = masks.expanded(name, mask, shape)
    by_query = mask is not None and mask.shape[2] > 1
    key_mask = None if mask is None or by_query else masks.key_mask(name, mask, batch, keys)
    if output == "ours" or (output == "auto" and row is None and not by_query):
        if by_query:
            raise ValueError(
                f"{name} calls attention with a mask that differs by query, which star_kernels.attention does not "
                "support: capture with output='auto' or 'model'"
            )
        out, maps = _ours(name, forward_pass, detach, call, call.value, key_mask)
        return (out if row is None else out.transpose(1, 2)), maps
    if mask is not None and by_query:
        out = function(*args, **kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            return out, _maps_by_query(name, forward_pass, call, mask)
    out, lse = _with_lse(row, detach, function, args, kwargs)
    if lse is None:
        _warn_of_second_pass("F.scaled_dot_product_attention" if row is None else row.name)
        return out, _ours(name, forward_pass, detach, call, call.key, key_mask)[1]
    assert row is not None
    lse = _laid_out(name, row, lse, call, key_mask)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        return out, _maps(name, forward_pass, call, lse, key_mask=key_mask)


def _maps_by_query(name: str, forward_pass: ForwardPass, call: Call, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return _maps(name, forward_pass, call, None, attn_mask=mask)
    # Any values: they would have to be read to know whether a bool mask has the same meaning.
    return biased_maps(
        call.query,
        call.key,
        mask,
        forward_pass.selection,
        rows=forward_pass.rows or (0, call.query.shape[2]),
        scale=call.scale,
        reduce_heads=not keeps_heads(forward_pass, call.query),
    )


def _maps(
    name: str,
    forward_pass: ForwardPass,
    call: Call,
    lse: Tensor | None,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    return attention_maps(
        call.query,
        call.key,
        lse,
        forward_pass.selection,
        rows=forward_pass.rows,
        key_mask=key_mask,
        attn_mask=attn_mask,
        scale=call.scale,
        reduce_heads=not keeps_heads(forward_pass, call.query),
        backend=backend_for(name, call.query, call.key),
    )


def _of_backend(name: str, row: Backend, kwargs: dict[str, Any]) -> Call:
    """The call of a function with layout [B, S, H, D]; arguments that it does not have are the defaults."""
    if found := unusual(row.name, kwargs):
        raise ValueError(
            f"{name} calls the attention backend {row.name} with {', '.join(found)}, which maps do not support"
        )
    query, key, value = (kwargs[part].transpose(1, 2) for part in ("query", "key", "value"))
    call = Call(query, key, value, **{k: v for k, v in kwargs.items() if k in Call._fields[4:]})
    return call._replace(attn_mask=masks.of_backend(name, row, kwargs.get("attn_mask"), call.shape))


def _check(name: str, forward_pass: ForwardPass, call: Call, shape: tuple[int, int, int, int]) -> None:
    if call.dropout_p or call.is_causal:
        raise ValueError(
            f"{name} calls attention with dropout_p={call.dropout_p}, is_causal={call.is_causal}: maps need "
            "dropout_p=0 and is_causal=False"
        )
    batch, _, queries, keys = shape
    expected, rows = forward_pass.selection.batch, forward_pass.rows
    if batch != expected:
        entries = "; for several images of each prompt the selection needs an entry for every image"
        several = "" if batch % expected else entries
        raise ValueError(
            f"the transformer must be called with a batch of {expected}{forward_pass.expected}, got {batch}{several}"
        )
    if rows is not None and rows[0] + rows[1] > queries:
        raise ValueError(
            f"{name} has {queries} queries, which do not include the image rows {rows[0]} to "
            f"{sum(rows) - 1}: choose other rows, or leave the module out of blocks"
        )
    if forward_pass.keys is None and queries == keys and (rows is None or rows == (0, queries)):
        raise ValueError(
            f"{name} attends from {queries} image positions to as many keys, as in self-attention of the image: leave "
            f"the module out of blocks, or pass keys={keys} if they are the text"
        )


def _ours(
    name: str, forward_pass: ForwardPass, detach: bool, call: Call, value: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, maps, _ = attention(
        call.query,
        call.key,
        value,
        forward_pass.selection,
        rows=forward_pass.rows,
        key_mask=key_mask,
        scale=call.scale,
        detach_maps=detach,
        reduce_heads=not keeps_heads(forward_pass, call.query),
        backend=backend_for(name, call.query, call.key, value),
    )
    return out, maps


def _with_lse(
    row: Backend | None, detach: bool, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor | None]:
    """The output of the function, and its log-sum-exp if it can be used.

    No backend computes the gradient of its log-sum-exp, so differentiable maps need a second pass.
    """
    usable = row is not None and row.lse is not None and (row.compiled or not torch.compiler.is_compiling())
    if row is None or row.lse is None or not usable or (torch.is_grad_enabled() and not detach):
        return function(*args, **kwargs), None
    result = function(*args, **{**kwargs, row.lse: True})
    if isinstance(result, tuple):  # some versions of the kernels return the output only
        return result[0], result[1]
    return result, None


def _laid_out(name: str, row: Backend, lse: Tensor, call: Call, key_mask: Tensor | None) -> Tensor:
    """The log-sum-exp of a backend as float32 [B, H, Sq]."""
    batch, heads, queries, _ = call.shape
    given = list(lse.shape)
    if row.layout == "packed" and given == [heads, batch * queries]:
        lse = lse.unflatten(1, (batch, queries)).transpose(0, 1)
    elif row.layout == "bsh":
        lse = lse.transpose(1, 2)
    if list(lse.shape[:2]) != [batch, heads] or lse.ndim != 3 or lse.shape[2] < queries:
        raise ValueError(
            f"{name}: the attention backend {row.name} returned a log-sum-exp of shape {given} for "
            f"{batch} samples, {heads} heads and {queries} queries: capture with output='ours', or choose another "
            "attention backend"
        )
    lse = lse[..., :queries].float()  # some versions pad it
    if row.name not in _verified and not torch.compiler.is_compiling() and not WATCH.observed():
        _verify(name, row, lse, call, key_mask)
    return lse


_verified: set[str] = set()  # backends whose log-sum-exp was compared
_warned: set[str] = set()  # functions of which a second pass was announced


@torch.no_grad()
def _verify(name: str, row: Backend, lse: Tensor, call: Call, key_mask: Tensor | None) -> None:
    """Compares a few rows with the log-sum-exp of the queries and keys, at the first call of a backend.

    Packages change the layout and the base of their log-sum-exp between versions.
    """
    if lse.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    last = call.query.shape[2] - 1
    few = torch.tensor([0, last // 3, last // 2, last], device=lse.device)
    scale = call.query.shape[3] ** -0.5 if call.scale is None else call.scale
    with torch.autocast(lse.device.type, enabled=False):
        scores = call.query.index_select(2, few).float() @ call.key.float().mT * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
    expected, found = scores.logsumexp(dim=-1), lse.index_select(2, few)
    close = torch.isclose(found, expected, rtol=row.tolerance, atol=row.tolerance, equal_nan=True)
    if not bool(close.all()):
        worst = float((found - expected)[~close].abs().max())
        raise ValueError(
            f"{name}: the log-sum-exp of the attention backend {row.name} differs by up to {worst:.3g} from that "
            "of its queries and keys, so this version has other conventions than those known: capture with "
            "output='ours', or choose another attention backend"
        )
    _verified.add(row.name)


@constant_in_graph  # the warning is given while torch.compile traces
def _warn_of_second_pass(what: str) -> None:
    if what in _warned:
        return
    _warned.add(what)
    warn(
        f"{what} returns no log-sum-exp that maps can use, so each captured attention call is computed twice, the "
        "second time for its maps: output='ours' computes it once, by star_kernels.attention"
    )
