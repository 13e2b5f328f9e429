"""Interception of attention calls in the thread that runs an attention processor.

Two ways to intercept ``F.scaled_dot_product_attention``. An :class:`Interception`, as a context, replaces the function
in ``torch.nn.functional``; the replacement looks up whether its own thread intercepts anything. :class:`FunctionMode`
intercepts the call under any name but adds microseconds to every call of a PyTorch function, about 70 in a transformer
block. Calls of other attention backends of diffusers are intercepted in :mod:`star_kernels.capture.backends`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_thread = threading.local()
_lock = threading.Lock()
_patches = 0  # contexts open, in all threads
_unpatched: Any = None  # F.scaled_dot_product_attention before the first of them was entered
_BUILTIN = F.scaled_dot_product_attention  # the function that a TorchFunctionMode receives


class Interception:
    """Replaces one attention call of a processor; its other calls are left unchanged.

    As a context it replaces ``F.scaled_dot_product_attention``; other threads reach PyTorch's function.

    Args:
        name: the attention module, for error messages.
        replacement: called with the function that was called, the name of diffusers' attention backend (None for
            ``F.scaled_dot_product_attention``), and the positional and the keyword arguments.
        call: the index of the call to replace; None for any.
        keys: the number of keys of the call to replace; None for any.
    """

    __slots__ = ("by_name", "call", "done", "keys", "name", "outer", "paused", "replacement", "seen")

    def __init__(
        self, name: str, replacement: Callable[..., Any], call: int | None = None, keys: int | None = None
    ) -> None:
        self.name = name
        self.replacement = replacement
        self.call = call
        self.keys = keys
        self.seen: list[int] = []  # the number of keys of each attention call
        self.done = False
        self.paused = False  # within an attention call, which may make others
        self.by_name = False  # whether a call was one of torch.nn.functional's function or of diffusers' dispatcher
        self.outer: Interception | None = None

    def run(self, function: Any, backend: str | None, keys: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an attention call of the processor, replaced or not."""
        self.paused = True
        try:
            if self._wanted(keys):
                return self.replacement(function, backend, args, kwargs)
            return function(*args, **kwargs)
        finally:
            self.paused = False

    def _wanted(self, keys: int) -> bool:
        position = len(self.seen)
        self.seen.append(keys)
        if (self.call is not None and position != self.call) or (self.keys is not None and keys != self.keys):
            return False
        if self.done:
            raise ValueError(
                f"{self.name} makes several attention calls, with {_listed(self.seen)} keys so far, and which has the "
                "text is unknown: pass call=0 for the first of them, or set Family.call or ImageTokens.keys"
            )
        self.done = True
        return True

    def check(self) -> None:
        """Raises if the processor made attention calls, but not the one to replace."""
        if self.seen and not self.done:
            wanted = "" if self.call is None else f" number {self.call} (counted from zero)"
            wanted += "" if self.keys is None else f" with {self.keys} keys"
            raise ValueError(
                f"{self.name} should make an attention call{wanted}, whose keys include the text, but it called "
                f"attention with {_listed(self.seen)} keys: leave the module out of blocks, or pass another call"
            )

    def __enter__(self) -> Interception:
        global _patches, _unpatched
        self.outer, _thread.interception = getattr(_thread, "interception", None), self
        with _lock:
            if not _patches:
                _unpatched, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _dispatch
            _patches += 1
        return self

    def __exit__(self, *exception: object) -> None:
        global _patches
        _thread.interception = self.outer
        with _lock:
            _patches -= 1
            if not _patches:
                F.scaled_dot_product_attention = _unpatched


class _Traced:
    """The interception of the processor that torch.compile traces, which cannot read variables of a thread."""

    interception: Interception | None = None


traced = _Traced()


def current() -> Interception | None:
    """The interception of the processor that runs in this thread."""
    if torch.compiler.is_compiling():
        return traced.interception
    found: Interception | None = getattr(_thread, "interception", None)
    return found


def _listed(counts: list[int]) -> str:
    return ", ".join(map(str, counts))


def _keys_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    key = args[1] if len(args) > 1 else kwargs["key"]
    count: int = key.shape[-2]
    return count


def _dispatch(*args: Any, **kwargs: Any) -> Any:
    interception = getattr(_thread, "interception", None)
    if interception is None or interception.paused:
        return _unpatched(*args, **kwargs)
    interception.by_name = True
    return interception.run(_unpatched, None, _keys_of(args, kwargs), args, kwargs)


class FunctionMode(TorchFunctionMode):
    """Context in which the function is intercepted under whatever name it is called."""

    def __init__(self, interception: Interception) -> None:
        super().__init__()
        self.interception = interception

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:  # torch.compile can trace it as a method, not as a function
            return args[0].unflatten(*args[1:], **kwargs)
        if func is not _BUILTIN or self.interception.paused:
            return func(*args, **kwargs)
        return self.interception.run(func, None, _keys_of(args, kwargs), args, kwargs)
