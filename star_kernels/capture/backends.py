"""Attention backends of diffusers' dispatcher: what each returns, and the interception of their calls.

While a model is captured, the functions in diffusers' registry of attention backends are wrapped, except that of
"native", which calls ``F.scaled_dot_product_attention``. A wrapper calls the function unless an attention processor
with a capture runs in its thread.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from star_kernels.capture.interception import current


@dataclass(frozen=True)
class Backend:
    """What a captured call of an attention backend of diffusers has to know.

    Args:
        name: its value in ``AttentionBackendName``.
        lse: the keyword argument with which its function also returns the log-sum-exp; None if it cannot.
        layout: of the log-sum-exp, "bhs", "bsh", or "packed" for ``[H, B * Sq]``. It is the natural logarithm for every
            backend.
        exact: whether the log-sum-exp is that of the given queries and keys, not of quantised ones.
        compiled: whether it can be used in a graph of torch.compile, which relies on the layout and the dtype that a
            custom operator declares.
        mask: how the function reads ``attn_mask``: "none" (an error), "sdpa" (as PyTorch), "keys" (reduced to one mask
            of keys for all queries), "count" (only the number of true values counts: the first keys take part), "flex",
            "xformers", or "unknown" (calls with a mask are errors).
    """

    name: str
    lse: str | None
    layout: str = "bhs"
    exact: bool = True
    compiled: bool = True
    mask: str = "none"

    @property
    def tolerance(self) -> float:
        """The largest difference of the log-sum-exp from that of the given queries and keys, in any dtype."""
        return 0.02 if self.exact else 0.25


BACKENDS = {
    row.name: row
    for row in (
        Backend("flash", "return_lse"),
        Backend("flash_hub", "return_lse"),
        Backend("flash_varlen", None, mask="count"),
        Backend("flash_varlen_hub", "return_lse", "packed", mask="keys"),
        Backend("_flash_3", "return_lse", "bsh", compiled=False),
        Backend("_flash_3_hub", "return_attn_probs"),
        Backend("_flash_varlen_3", "return_lse", "packed", mask="count"),
        Backend("_flash_3_varlen_hub", "return_lse", "packed", mask="keys"),
        Backend("flash_4_hub", "return_lse"),
        Backend("aiter_fa2_hub", "return_lse"),
        Backend("sage", "return_lse", exact=False),
        Backend("sage_hub", "return_lse", exact=False),
        Backend("_sage_qk_int8_pv_fp8_cuda", "return_lse", exact=False),
        Backend("_sage_qk_int8_pv_fp8_cuda_sm90", "return_lse", exact=False),
        Backend("_sage_qk_int8_pv_fp16_cuda", "return_lse", exact=False),
        Backend("_sage_qk_int8_pv_fp16_triton", "return_lse", exact=False),
        Backend("sage_varlen", None, mask="count"),
        Backend("sage_blackwell_hub", None),
        Backend("flex", None, mask="flex"),
        Backend("xformers", None, mask="xformers"),
        Backend("_native_cudnn", None, mask="sdpa"),
        Backend("_native_efficient", None, mask="sdpa"),
        Backend("_native_flash", None),
        Backend("_native_math", None, mask="sdpa"),
        Backend("_native_npu", None, mask="unknown"),
        Backend("_native_xla", None),
    )
}
UNWRAPPED = "native"
_ARGUMENTS = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}

_lock = threading.Lock()
_users = 0  # captures that are attached
_originals: dict[Any, Callable[..., Any]] = {}
_wrappers: dict[Any, Callable[..., Any]] = {}
_defaults: dict[str, dict[str, Any]] = {}


def wrap() -> None:
    """Wraps the functions of diffusers' registry; undone by the same number of calls of :func:`unwrap`."""
    global _users
    with _lock:
        _users += 1
        for member, function in _registry().items():
            name = getattr(member, "value", member)
            if member not in _originals and name != UNWRAPPED:
                _originals[member] = function
                _defaults[name] = {p.name: p.default for p in inspect.signature(function).parameters.values()}
                _registry()[member] = _wrappers[member] = _wrapped(name, function)


def unwrap() -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            registry = _registry()
            for member, function in _originals.items():
                if registry.get(member) is _wrappers[member]:  # not if another was registered meanwhile
                    registry[member] = function
            _originals.clear()
            _wrappers.clear()


def _registry() -> dict[Any, Callable[..., Any]]:
    """diffusers' functions by backend; empty if nothing has imported its dispatcher."""
    module = sys.modules.get("diffusers.models.attention_dispatch")
    found: dict[Any, Callable[..., Any]] = getattr(getattr(module, "_AttentionBackendRegistry", None), "_backends", {})
    return found


def _wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        interception = current()
        if interception is None or interception.paused:
            return function(*args, **kwargs)
        interception.by_name = True
        if args:
            kwargs = {**dict(zip(_defaults[name], args, strict=False)), **kwargs}
        return interception.run(function, name, kwargs["key"].shape[1], (), kwargs)

    return call


def unusual(name: str, kwargs: Mapping[str, Any]) -> list[str]:
    """Arguments of a call that change its result in a way that maps do not follow, such as a window."""
    if kwargs.get("_parallel_config") is not None:
        return ["context parallelism"]
    given = {k: v for k, v in kwargs.items() if k not in _ARGUMENTS and v is not _defaults[name].get(k)}
    return [f"{k}={v!r}" for k, v in given.items() if isinstance(v, Tensor) or v != _defaults[name].get(k)]
