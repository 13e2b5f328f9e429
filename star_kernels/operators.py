"""Operators registered with torch.library, called without the dispatcher where nothing but the kernel wants to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = frozenset((Tensor, nn.Parameter))


class _Library(torch.library.Library):
    """A library whose autograd kernels refuse what they would get wrong."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: Any = "", **options: Any) -> None:
        super().impl(op_name, _guarded(op_name, fn) if dispatch_key == "Autograd" else fn, dispatch_key, **options)


_library = _Library("star_kernels", "DEF")


class Operator:
    """An operator ``star_kernels::name``: schema, implementation, shapes and gradient.

    Calling it means calling ``torch.ops.star_kernels.name``. On plain tensors, with no tracing, no dispatch mode, no
    forward-mode differentiation and no transform of torch.func about, the implementation (or an autograd.Function
    around it) is called directly: the round through the dispatcher and back into Python would cost twice what the rest
    of a small call does.

    Args:
        schema: as for ``torch.library.define``, without the namespace; tensors come before other arguments.
        implementation: for real tensors.
        shapes: for fake ones.
        check: raises unless arguments fit the implementation; run where the dispatcher calls it, for anyone may then
            be the caller. The functions of star_kernels, which check more, come to the implementation without it.
        setup_context, backward: the gradient, as for ``torch.library.register_autograd``; both or none. Whoever
            differentiates an operator without one gets an error.
        devices: dispatch keys of the implementation.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., Any],
        shapes: Callable[..., Any],
        *,
        check: Callable[..., None],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        devices: Sequence[str] = ("CompositeExplicitAutograd",),
    ) -> None:
        name = schema[: schema.index("(")]
        _library.define(schema)
        for device in devices:
            _library.impl(name, _checked(check, implementation), device)
        torch.library.register_fake(f"star_kernels::{name}", shapes, lib=_library)
        if setup_context is None or backward is None:
            setup_context, backward = _keep_nothing, _no_derivative(name)
        torch.library.register_autograd(f"star_kernels::{name}", backward, setup_context=setup_context, lib=_library)
        self.overload = getattr(torch.ops.star_kernels, name).default
        self._tensors = schema[: schema.index("->")].count("Tensor")
        self._implementation = implementation
        self._function = _function(name, implementation, setup_context, backward)
        self._transformable = _transformable(name, self, setup_context, backward)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*arguments)
        if WATCH.observed():
            return (self._transformable.apply if WATCH.differentiated() else self.overload)(*arguments)
        tensors = [a for a in arguments[: self._tensors] if a is not None]
        if not _in_memory(tensors):
            return self.overload(*arguments)
        if torch.is_grad_enabled() and WATCH.requires_grad(*tensors):
            return self._function.apply(*arguments)
        return self._implementation(*arguments)


def constants(*tensors: Any) -> list[Any]:
    """The tensors, or None, for a function that does not differentiate them, in no mode."""
    dual = WATCH.dual()
    return [t.detach() if t is not None and (dual or t.requires_grad) else t for t in tensors]


def _checked(check: Callable[..., None], implementation: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any) -> Any:
        check(*arguments)
        return implementation(*arguments)

    return checked


def _in_memory(tensors: list[Tensor]) -> bool:
    """Whether the memory of all tensors holds their values: the dispatcher resolves negated views and zeros without
    memory, which not all of PyTorch's own kernels do, and subclasses are its own."""
    if not _PLAIN.issuperset(map(type, tensors)) or any(map(Tensor.is_neg, tensors)):
        return False
    try:
        return all(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # no storage: another layout, or a tensor of torch.func
        return False


def _function(name: str, implementation: Any, setup_context: Any, backward: Any) -> Any:
    """The autograd.Function of an operator. It calls setup_context itself: PyTorch would bind the arguments by their
    signature first, which costs more than all the rest of the call."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = implementation(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _transformable(name: str, operator: Any, setup_context: Any, backward: Any) -> Any:
    """The same in the form that the transforms of torch.func take; ``operator`` runs below them."""

    def context(ctx: Any, inputs: Any, output: Any) -> None:
        setup_context(ctx, inputs, output)

    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse_tangents(name)

    members = {
        "forward": staticmethod(lambda *arguments: operator(*arguments)),
        "setup_context": staticmethod(context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
        "generate_vmap_rule": True,
    }
    return type(name, (torch.autograd.Function,), members)


def _guarded(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd kernel, which knows nothing of tangents and of torch.func, with errors for both."""

    def guarded(keyset: Any, *arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if WATCH.dual() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            _refuse_tangents(name)
        if torch.is_grad_enabled() and WATCH.differentiated() and any(t.requires_grad for t in tensors):
            raise NotImplementedError(
                f"torch.ops.star_kernels.{name} cannot be differentiated by torch.func: call the function of "
                "star_kernels, which can, or use torch.autograd"
            )
        return kernel(keyset, *arguments)

    return guarded


def _refuse_tangents(name: str) -> NoReturn:
    raise NotImplementedError(
        f"star_kernels::{name} has no forward-mode derivative (torch.func.jvp, torch.func.jacfwd, "
        "torch.autograd.forward_ad): use reverse mode, or backend='naive' where the function has it"
    )


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_derivative(name: str) -> Callable[..., NoReturn]:
    first = name.removesuffix("_backward")
    which = "derivative" if first == name else "second derivative: it cannot be differentiated twice"

    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(f"star_kernels::{first} has no {which}")

    return backward


class _Watch(NamedTuple):
    """What private names of PyTorch tell, asked nowhere else."""

    observed: Callable[[], bool]  # a dispatch mode (fake tensors, tracing, counters) or one of the two below is active
    transformed: Callable[[], bool]  # a transform of torch.func
    differentiated: Callable[[], bool]  # one that differentiates
    vectorised: Callable[[], bool]  # torch.vmap
    dual: Callable[[], bool]  # forward-mode differentiation
    requires_grad: Callable[..., bool]  # whether one of the arguments does


def _watch() -> _Watch:
    """Where a torch lacks one of the names every call goes through the dispatcher: safe, and slower."""
    try:
        from torch._C import _any_requires_grad, _len_torch_dispatch_stack
        from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack

        forward_ad._current_level + 0  # the number of open levels, less one
        kinds, vmap = (TransformType.Grad, TransformType.Jvp), TransformType.Vmap
    except (ImportError, AttributeError):
        yes, no = (lambda: True), (lambda: False)
        return _Watch(yes, no, no, no, yes, lambda *_: True)

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

    return _Watch(observed, transformed, differentiated, vectorised, dual, _any_requires_grad)


WATCH = _watch()
