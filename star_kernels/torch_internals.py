"""Private names of PyTorch: modes, transforms, constants of a graph, the backward pass. The only file that uses them.

They are looked up once. If a version of torch lacks one of those that report modes, every call goes through the
dispatcher, which is slower and handles every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.utils._pytree
from torch import Tensor
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_in_graph(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which would import the compiler: two seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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
_RUN = getattr(torch.autograd.graph, "_engine_run_backward", None)


def run_backward(output: Tensor, gradient: Tensor) -> None:
    """``output.backward(gradient)`` for plain tensors of equal shape, without checks, which take most of the time."""
    if _RUN is None:
        torch.autograd.backward(output, gradient)
    else:
        _RUN((output,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


_TASK = getattr(torch._C, "_current_graph_task_id", None)


def in_backward() -> bool:
    """Whether this thread runs a backward pass of autograd; True if that is unknown."""
    return _TASK is None or _TASK() != -1


def register_pytree(cls: type[Any], flatten: Callable[[Any], tuple[Any, ...]]) -> None:
    """Lets the transforms of torch.func look into objects of a class, which is called with what ``flatten`` returns."""
    register = getattr(torch.utils._pytree, "register_pytree_node", None)
    if register is not None:
        name = f"{cls.__module__}.{cls.__qualname__}"
        register(cls, lambda x: (list(flatten(x)), None), lambda children, _: cls(*children), serialized_type_name=name)
