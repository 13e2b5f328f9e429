"""Private names of PyTorch that report which modes and transforms are active. The only file that uses them.

They are looked up once. If a version of torch lacks one of them, every call goes through the dispatcher, which is
slower and handles every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch.autograd import forward_ad


class Watch(NamedTuple):
    """Questions about the state of PyTorch."""

    observed: Callable[[], bool]  # a dispatch mode (fake tensors, tracing, counters), torch.func or forward mode
    transformed: Callable[[], bool]  # a transform of torch.func
    differentiated: Callable[[], bool]  # a transform of torch.func that differentiates
    vectorised: Callable[[], bool]  # torch.vmap
    dual: Callable[[], bool]  # forward-mode differentiation
    requires_grad: Callable[..., bool]  # whether one of the arguments requires a gradient
    autocasting: Callable[[], bool]  # torch.autocast on any kind of device


def watch() -> Watch:
    """The questions for the installed version of torch."""
    try:
        from torch._C import _any_requires_grad, _is_any_autocast_enabled, _len_torch_dispatch_stack
        from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack

        forward_ad._current_level + 0  # the number of open levels, less one
        kinds, vmap = (TransformType.Grad, TransformType.Jvp), TransformType.Vmap
    except (ImportError, AttributeError):
        yes, no = (lambda: True), (lambda: False)
        return Watch(yes, no, no, no, yes, lambda *_: True, yes)

    def transformed() -> bool:
        return peek_interpreter_stack() is not None

    def dual() -> bool:
        return forward_ad._current_level >= 0

    def observed() -> bool:
        return _len_torch_dispatch_stack() > 0 or peek_interpreter_stack() is not None or forward_ad._current_level >= 0

    def differentiated() -> bool:
        return any(interpreter.key() in kinds for interpreter in get_interpreter_stack() or ())

    def vectorised() -> bool:
        return any(interpreter.key() == vmap for interpreter in get_interpreter_stack() or ())

    return Watch(observed, transformed, differentiated, vectorised, dual, _any_requires_grad, _is_any_autocast_enabled)


WATCH = watch()
