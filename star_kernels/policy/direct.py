"""Ordinary calls of the losses: the compiled library validates the arguments, and one pass also computes the gradient.

A call is ordinary if PyTorch computes eagerly (no compilation, dispatch mode, transform of torch.func or forward-mode
differentiation) and the compiled library accepts the arguments. Other calls return None here and take the general way,
which raises the error if there is one.

If a gradient is wanted, the forward pass stores it for an upstream gradient of one, in memory of the size of
model_output. The backward pass hands that memory over; it computes the gradient again, from the inputs, if the upstream
gradient is not one, so that the gradient is rounded once, and in a second backward pass through a retained graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.operators import Operator, constants, in_memory, is_direct
from star_kernels.policy import kernels, naive, ops
from star_kernels.policy.arguments import (
    Backward,
    Declaration,
    NftArguments,
    PolicyArguments,
    SampleArguments,
)
from star_kernels.policy.layouts import empty_like, walkable
from star_kernels.torch_internals import WATCH, run_backward

# What the library raises for arguments it cannot read, and PyTorch for tensors without a dimension.
REJECTED = (TypeError, ValueError, RuntimeError, BufferError, IndexError)
_LARGEST = torch.finfo(torch.float32).max
FREED = (
    "Trying to backward through the graph a second time: PolicyLoss.backward has freed it. Compute the loss again, or "
    "call loss.backward(retain_graph=True) first."
)


class Pass:
    """A forward pass: its results, and its inputs until they are saved by the loss's autograd node or freed."""

    __slots__ = (
        *("absent_metrics", "differentiable", "error", "gradient", "inputs", "metrics", "objective", "saved"),
        *("scalars", "value", "versions"),
    )

    def __init__(self, objective: Objective, arguments: Any, loss: Tensor, metrics: Tensor, saved: Tensor) -> None:
        self.objective, self.scalars = objective, arguments[objective.n_tensors :]
        self.value: Tensor = loss  # without a graph, until the node has returned it
        self.metrics, self.saved, self.absent_metrics = metrics, saved, arguments.absent_metrics
        self.differentiable = False
        self.inputs: Any = None  # if differentiable, until the node has saved them
        self.gradient: Tensor | None = None  # if differentiable, until it is handed over
        self.error: str | None = None  # why there can be no backward pass

    def keep(self, inputs: Any, gradient: Tensor) -> None:
        """Keeps what the backward pass needs."""
        self.inputs, self.gradient, self.differentiable = inputs, gradient, True
        try:
            self.versions = [t._version for t in inputs if t is not None]
        except RuntimeError:  # tensors of inference mode, which autograd cannot save: this raises its error
            self.objective.apply(inputs[0], self)

    def attach(self) -> Tensor:
        """The loss with its autograd node, if it is differentiable."""
        if self.inputs is None:
            return self.value
        if WATCH.transformed():
            raise RuntimeError(
                "PolicyLoss.loss must be read before a transform of torch.func if the loss is computed before it"
            )
        self.error = self._change()
        if torch.is_grad_enabled():
            loss = self.objective.apply(self.inputs[0], self)
        else:
            with torch.inference_mode(False), torch.enable_grad():
                loss = self.objective.apply(self.inputs[0], self)
        self.inputs = None
        del self.value  # its node refers to this pass
        return loss

    def backward(self, loss: Tensor | None, scale: float | Tensor) -> bool:
        """``(loss * scale).backward()`` without the node of the loss, which is None if there is no node yet.

        Returns False, and does nothing, if the loss is not that of this pass, if a mode observes the call, and for a
        scale whose value is not in its memory or is complex.
        """
        inputs = self.inputs
        if isinstance(scale, Tensor) and not (is_direct([scale]) and in_memory([scale]) and not scale.is_complex()):
            return False
        if loss is not None:
            node = loss.grad_fn
            if getattr(node, "done", None) is not self or not is_direct([loss]):
                return False
            if self.error is None:
                inputs = node.saved_tensors  # type: ignore[union-attr]  # see _backward
        elif self.error is None:
            self.error = self._change()
        if self.error is not None:
            raise RuntimeError(self.error)
        grad_loss = None
        if isinstance(scale, Tensor):
            grad_loss = scale.to(self.saved.device, torch.float32).reshape(())
        elif scale != 1.0:
            rounded = math.copysign(math.inf, scale) if abs(scale) > _LARGEST else scale
            grad_loss = torch.full_like(_number(self.saved.device), rounded)
        gradient = self.differentiate(inputs, grad_loss)
        self.error, self.inputs = FREED, None
        run_backward(inputs[0], gradient)
        return True

    def differentiate(self, inputs: tuple[Any, ...], grad_loss: Tensor | None) -> Tensor:
        """The gradient with respect to model_output, for an upstream gradient of one if ``grad_loss`` is None."""
        gradient, self.gradient = self.gradient, None
        objective, on_cpu = self.objective, inputs[0].is_cpu
        written = gradient is not None
        if gradient is not None and (grad_loss is None or (on_cpu and _is_ones(grad_loss))):
            return gradient
        with torch.no_grad():
            arguments = walkable(objective.arguments._make((*inputs, *self.scalars)), objective.declared)
            if gradient is None:
                gradient = empty_like(arguments.model_output, arguments.channel_dim)
            if grad_loss is None:
                grad_loss = torch.ones_like(_number(self.saved.device))
            results = Backward(grad_loss.contiguous(), self.saved, gradient)
            objective.backward_kernel("native", arguments, results, written and not on_cpu)
        return gradient

    def _change(self) -> str | None:
        """The error of an input that was modified in place since the pass, or None."""
        current = [t._version for t in self.inputs if t is not None]
        if current == self.versions:
            return None
        names = [name for name, t in zip(self.objective.declared.kinds, self.inputs, strict=False) if t is not None]
        changed = [name for name, now, then in zip(names, current, self.versions, strict=True) if now != then]
        return (
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{', '.join(changed)}, after the loss was computed and before its backward pass"
        )


class Objective:
    """The ordinary calls of one objective.

    Args:
        operator: the backward operator, for modes and transforms that observe the backward pass.
    """

    def __init__(
        self,
        name: str,
        arguments: type[PolicyArguments] | type[NftArguments],
        *,
        metrics: Sequence[str],
        forward: Callable[..., None],
        backward: Callable[..., None],
        operator: Operator,
    ) -> None:
        self.arguments: Any = arguments
        self.declared = Declaration(arguments)
        self.n_tensors = self.declared.n_tensors
        self.backward_kernel, self.operator = backward, operator
        self.metrics, self._forward_kernel = metrics, forward
        members = {"forward": staticmethod(_forward), "backward": staticmethod(_backward)}
        function = type(name, (torch.autograd.Function,), members)
        self.apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]  # see operators.Operator

    def __call__(self, given: PolicyArguments | NftArguments, backend: str) -> Pass | None:
        """The forward pass of an ordinary call, or None."""
        model_output, advantages = given.model_output, given.advantages
        inputs: tuple[Any, ...] = given[: self.n_tensors]
        tensors = [t for t in inputs if t is not None]
        if advantages is None or not _may_run(backend, tensors):
            return None
        try:
            arguments = walkable(given, self.declared)
            batch = model_output.shape[0]
            empty = advantages.new_empty
            loss = empty(batch) if given.unreduced else torch.empty_like(_number(model_output.device))
            metrics, saved = empty(len(self.metrics)), empty(given.saved_rows * batch)
            differentiable = model_output.requires_grad and torch.is_grad_enabled()
            gradient = empty_like(arguments.model_output, given.channel_dim) if differentiable else None
            self._forward_kernel("native", arguments, (loss, metrics, saved), gradient)
        except REJECTED:
            return None
        done = Pass(self, given, loss, metrics, saved)
        if gradient is not None:
            if WATCH.requires_grad(*tensors[1:]):
                inputs = (model_output, *constants(*inputs[1:]))
            done.keep(inputs, gradient)
        return done

    def constants(self, arguments: Any) -> Any:
        """The arguments, of which only model_output is differentiated."""
        n = self.n_tensors
        return arguments._make((arguments.model_output, *constants(*arguments[1:n]), *arguments[n:]))


def _forward(ctx: Any, model_output: Tensor, done: Pass) -> Tensor:
    ctx.done = done
    ctx.save_for_backward(*done.inputs)
    ctx.set_materialize_grads(False)
    return done.value


def _backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, None]:
    done = ctx.done
    if done.error is not None:
        raise RuntimeError(done.error)
    inputs = ctx.saved_tensors  # raises an error if an input was modified in place, or if the graph was freed
    if grad_loss is None:
        return None, None
    if torch.is_grad_enabled() or not (is_direct([grad_loss]) and in_memory([grad_loss])):
        saved = done.saved.view(-1, inputs[0].shape[0])
        return done.objective.operator(grad_loss, saved, *inputs, *done.scalars, "native"), None
    return done.differentiate(inputs, grad_loss), None


def sample_transition(arguments: SampleArguments, backend: str) -> tuple[Tensor, Tensor] | None:
    """The results of an ordinary sampling step, or None."""
    tensors: list[Any] = list(arguments[: ops.SAMPLE.n_tensors])
    if not _may_run(backend, tensors):
        return None
    try:
        return ops.sample_transition(arguments, "native")
    except REJECTED:
        return None


def _may_run(backend: str, tensors: list[Tensor]) -> bool:
    """Whether the compiled library may be called with these tensors. The first is the model's output."""
    if backend not in ("auto", "native") or not is_direct(tensors):
        return False
    first = tensors[0]
    if first.dtype == torch.float64:
        return False
    return (first.is_cpu and native.cpu() is not None) or (first.is_cuda and native.cuda() is not None)


@cache
def _number(device: torch.device) -> Tensor:
    """A number whose memory others are allocated like, which takes half the time of other ways."""
    return torch.empty((), dtype=torch.float32, device=device)


def _is_ones(grad_loss: Tensor) -> bool:
    return grad_loss.item() == 1.0 if grad_loss.ndim == 0 else bool((grad_loss == 1.0).all())


POLICY = Objective(
    "weighted_policy_loss",
    PolicyArguments,
    metrics=naive.METRICS,
    forward=kernels.policy_forward,
    backward=kernels.policy_backward,
    operator=ops.WEIGHTED_POLICY_LOSS_BACKWARD,
)
NFT = Objective(
    "weighted_nft_loss",
    NftArguments,
    metrics=naive.NFT_METRICS,
    forward=kernels.nft_forward,
    backward=kernels.nft_backward,
    operator=ops.WEIGHTED_NFT_LOSS_BACKWARD,
)
