"""Operators registered with torch.library, called without the dispatcher where nothing but the kernel wants to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_library = torch.library.Library("star_kernels", "DEF")
_PLAIN = frozenset((Tensor, nn.Parameter, int, float, bool, str, type(None)))


class Operator:
    """An operator ``star_kernels::name``: schema, implementation, shapes and gradient.

    Calling it means calling ``torch.ops.star_kernels.name``. On plain tensors, with no tracing, no dispatch mode and no
    functorch transform about, the implementation (or an autograd.Function around it) is called directly: the round
    through the dispatcher and back into Python would cost twice what the rest of a small call does.

    Args:
        schema: as for ``torch.library.define``, without the namespace.
        implementation: for real tensors.
        shapes: for fake ones.
        setup_context, backward: the gradient, as for ``torch.library.register_autograd``; both or none.
        devices: dispatch keys of the implementation.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., Any],
        shapes: Callable[..., Any],
        *,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        devices: Sequence[str] = ("CompositeExplicitAutograd",),
    ) -> None:
        name = schema[: schema.index("(")]
        _library.define(schema)
        for device in devices:
            _library.impl(name, implementation, device)
        torch.library.register_fake(f"star_kernels::{name}", shapes, lib=_library)
        self.overload = getattr(torch.ops.star_kernels, name).default
        self._implementation = implementation
        self._function: Any = None
        if backward is not None:
            torch.library.register_autograd(
                f"star_kernels::{name}", backward, setup_context=setup_context, lib=_library
            )
            self._function = _function(name, implementation, setup_context, backward)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _observed():
            return self.overload(*arguments)
        if not _PLAIN.issuperset(map(type, arguments)):
            return self.overload(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            if self._function is None:
                return self.overload(*arguments)
            return self._function.apply(*arguments)
        return self._implementation(*arguments)


def _function(name: str, implementation: Any, setup_context: Any, backward: Any) -> Any:
    """The autograd.Function of an operator. It calls setup_context itself: PyTorch would bind the arguments by their
    signature first, which costs more than all the rest of the call."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = implementation(*arguments)
        setup_context(ctx, arguments, output)
        return output

    def backward_once(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return outputs
        # create_graph=True: whoever differentiates these gradients is told, even where the upstream one is a constant.
        return tuple([g if g is None else _Undifferentiable.apply(g.detach().requires_grad_(), name) for g in outputs])

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
    return type(name, (torch.autograd.Function,), members)


class _Undifferentiable(torch.autograd.Function):
    """The identity, in a graph that ends here with an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"star_kernels::{ctx.name} has no second derivative: it cannot be differentiated twice")


def _observed() -> bool:
    """Whether a dispatch mode (fake tensors, tracing, counters) or a functorch transform is active."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
