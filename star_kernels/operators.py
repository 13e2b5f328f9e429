"""Operators registered with torch.library, and called without the dispatcher if no mode or transform is active."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from star_kernels.torch_internals import WATCH

_PLAIN = frozenset((Tensor, nn.Parameter))


class _Library(torch.library.Library):
    """A library whose autograd kernels raise an error for what they cannot differentiate."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: Any = "", **options: Any) -> None:
        super().impl(op_name, _guarded(op_name, fn) if dispatch_key == "Autograd" else fn, dispatch_key, **options)


_library = _Library("star_kernels", "DEF")


class Operator:
    """An operator ``star_kernels::name``: schema, implementation, shapes and gradient.

    A call is equivalent to a call of ``torch.ops.star_kernels.name``. If all tensors are plain ones and no tracing,
    dispatch mode, forward-mode differentiation or transform of torch.func needs to see the call, the implementation (or
    an autograd.Function around it) is called directly: the way through the dispatcher and back into Python would take
    twice the time of the rest of a small call.

    Args:
        schema: as for ``torch.library.define``, without the namespace; tensors come before other arguments.
        implementation: for real tensors.
        shapes: the implementation for fake tensors.
        check: raises an error unless the arguments are valid. It runs when the dispatcher calls the implementation, as
            then the caller may be any code; the functions of star_kernels, which check more, skip it.
        setup_context, backward: the gradient, as for ``torch.library.register_autograd``; both or neither. An operator
            without a gradient raises an error when it is differentiated.
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
        torch.library.register_fake(f"star_kernels::{name}", _on_one_device(schema, shapes), lib=_library)
        if setup_context is None or backward is None:
            setup_context, backward = _keep_nothing, _no_derivative(name)
        torch.library.register_autograd(f"star_kernels::{name}", backward, setup_context=setup_context, lib=_library)
        self.overload = getattr(torch.ops.star_kernels, name).default
        self._tensors = schema[: schema.index("->")].count("Tensor")
        self._implementation = implementation
        function = _function(name, implementation, setup_context, backward)
        # The method of Function's base class: Function's own first looks for dead wrappers of torch.func in all
        # arguments, which have no memory and do not come here.
        self.differentiable = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        self._transformable = _transformable(name, self, setup_context, backward)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*arguments)
        if WATCH.observed():
            return (self._transformable.apply if WATCH.differentiated() else self.overload)(*arguments)
        tensors = [a for a in arguments[: self._tensors] if a is not None]
        if not in_memory(tensors):
            return self.overload(*arguments)
        if torch.is_grad_enabled() and WATCH.requires_grad(*tensors):
            return self.differentiable(*arguments)
        return self._implementation(*arguments)


def constant(tensor: Tensor) -> Tensor:
    """The tensor as a constant: detached if any mode would differentiate it."""
    return tensor.detach() if tensor.requires_grad or WATCH.dual() else tensor


def constants(*tensors: Any) -> list[Any]:
    """The same for several tensors, any of which may be None."""
    dual = WATCH.dual()
    return [t.detach() if t is not None and (dual or t.requires_grad) else t for t in tensors]


def _checked(check: Callable[..., None], implementation: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any) -> Any:
        check(*arguments)
        return implementation(*arguments)

    return checked


def _on_one_device(schema: str, shapes: Callable[..., Any]) -> Callable[..., Any]:
    """``shapes`` for tensors on one device. PyTorch calls it for real tensors too, if one of the others is fake or on
    the meta device, and its result would then be uninitialised memory."""
    names = [declared.split()[-1] for declared in schema[schema.index("(") + 1 : schema.index(")")].split(", ")]

    def checked(*arguments: Any) -> Any:
        tensors = [(name, a) for name, a in zip(names, arguments, strict=True) if isinstance(a, Tensor)]
        first, like = tensors[0]
        for name, tensor in tensors:
            if tensor.device != like.device:
                raise ValueError(f"{name} must be on the device of {first}, {like.device}, got {tensor.device}")
        return shapes(*arguments)

    return checked


def is_direct(tensors: list[Tensor]) -> bool:
    """Whether a call with these tensors needs no dispatcher, if they have memory, which compiled libraries check."""
    if torch.compiler.is_compiling() or WATCH.observed():
        return False
    return _PLAIN.issuperset(map(type, tensors)) and not any(map(Tensor.is_neg, tensors))


def in_memory(tensors: list[Tensor]) -> bool:
    """Whether the values of all tensors are in their memory.

    If not, the dispatcher is needed: it resolves negated views and zeros without memory, which not all of PyTorch's own
    kernels do, and it calls the handlers of subclasses.
    """
    if not _PLAIN.issuperset(map(type, tensors)) or any(map(Tensor.is_neg, tensors)):
        return False
    try:
        return all(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # no storage: another layout, or a tensor of torch.func
        return False


def _function(name: str, implementation: Any, setup_context: Any, backward: Any) -> Any:
    """The autograd.Function of an operator.

    Its forward method calls setup_context directly: PyTorch would first bind the arguments to the signature, which
    takes longer than the rest of the call.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = implementation(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _transformable(name: str, operator: Any, setup_context: Any, backward: Any) -> Any:
    """The autograd.Function of an operator in the form that torch.func accepts; ``operator`` runs inside it."""

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
    """The autograd kernel with errors for tangents and torch.func, which it would ignore."""

    def guarded(keyset: Any, *arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if WATCH.dual() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            _refuse_tangents(name)
        if torch.is_grad_enabled() and WATCH.differentiated() and any(t.requires_grad for t in tensors):
            raise NotImplementedError(
                f"torch.ops.star_kernels.{name} does not support differentiation by torch.func: call the function of "
                "star_kernels, which does, or use torch.autograd"
            )
        return kernel(keyset, *arguments)

    return guarded


def _refuse_tangents(name: str) -> NoReturn:
    raise NotImplementedError(
        f"star_kernels::{name} has no forward-mode derivative (torch.func.jvp, torch.func.jacfwd, "
        "torch.autograd.forward_ad): use reverse mode, or backend='naive' if the function has that backend"
    )


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _no_derivative(name: str) -> Callable[..., NoReturn]:
    first = name.removesuffix("_backward")
    which = "derivative" if first == name else "second derivative: it cannot be differentiated twice"

    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(f"star_kernels::{first} has no {which}")

    return backward
