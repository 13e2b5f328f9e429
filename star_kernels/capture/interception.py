"""Interception of ``F.scaled_dot_product_attention`` in the thread that runs an attention processor.

Two ways to intercept the call. An :class:`Interception`, as a context, replaces the function in
``torch.nn.functional``; the replacement looks up whether its own thread intercepts anything. :class:`FunctionMode`
intercepts the call under any name but adds microseconds to every call of a PyTorch function, about 70 in a transformer
block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_thread = threading.local()
_lock = threading.Lock()
_patches = 0  # contexts open, in all threads
_unpatched: Any = None  # F.scaled_dot_product_attention before the first of them was entered
_BUILTIN = F.scaled_dot_product_attention  # the function that a TorchFunctionMode receives


class Interception:
    """Replaces the first attention call of a processor; later ones (image prompt adapters) are left unchanged.

    As a context it replaces ``F.scaled_dot_product_attention``; other threads reach PyTorch's function.
    """

    __slots__ = ("by_name", "done", "outer", "replacement")

    def __init__(self, replacement: Callable[..., Any]) -> None:
        self.replacement = replacement
        self.done = False
        self.by_name = False  # whether the call was one of torch.nn.functional's function
        self.outer: Interception | None = None

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


def _dispatch(*args: Any, **kwargs: Any) -> Any:
    interception = getattr(_thread, "interception", None)
    if interception is None or interception.done:
        return _unpatched(*args, **kwargs)
    interception.done = interception.by_name = True
    return interception.replacement(*args, **kwargs)


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
        if self.interception.done or func is not _BUILTIN:
            return func(*args, **kwargs)
        self.interception.done = True
        return self.interception.replacement(*args, **kwargs)
