"""Ordinary calls of the losses: the compiled library validates the arguments, and one pass also computes the gradient.

A call is ordinary if PyTorch computes eagerly (no compilation, dispatch mode, transform of torch.func or forward-mode
differentiation) and the compiled library accepts the arguments. Other calls return None here and take the general way,
which raises the error if there is one.

If a gradient is wanted, the forward pass stores it for an upstream gradient of one, in memory of the size of
model_output. The backward pass hands that memory over; it computes the gradient again, from the inputs, if the upstream
gradient is not one, so that the gradient is rounded once, and in a second backward pass through a retained graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.operators import Operator, constants, is_direct
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

REJECTED = (TypeError, ValueError, RuntimeError, BufferError)  # what the library raises for arguments it cannot read
FREED = (
    "Trying to backward through the graph a second time: PolicyLoss.backward has freed it. Compute the loss again, or "
    "call loss.backward(retain_graph=True) first."
)


class Pass:
    """A forward pass: what its autograd node keeps besides the inputs."""

    __slots__ = ("freed", "gradient", "loss", "objective", "saved", "scalars", "tensors")

    def __init__(
        self, objective: Objective, tensors: Any, scalars: Any, loss: Tensor, saved: Tensor, gradient: Tensor
    ) -> None:
        self.objective, self.scalars, self.saved = objective, scalars, saved
        self.tensors: Any = tensors  # until the node has saved them
        self.loss: Tensor | None = loss  # until the node has returned it
        self.gradient: Tensor | None = gradient  # until it is handed over
        self.freed = False

    def differentiate(self, tensors: tuple[Any, ...], grad_loss: Tensor | None) -> Tensor:
        """The gradient with respect to model_output, for an upstream gradient of one if ``grad_loss`` is None."""
        gradient, self.gradient = self.gradient, None
        objective, on_cpu = self.objective, not tensors[0].is_cuda
        written = gradient is not None
        if gradient is not None and (grad_loss is None or (on_cpu and _is_ones(grad_loss))):
            return gradient
        arguments = objective.arguments._make((*tensors, *self.scalars))
        with torch.no_grad():
            arguments = walkable(arguments, objective.declared)
            if gradient is None:
                gradient = empty_like(arguments.model_output, arguments.channel_dim)
            if grad_loss is None:
                grad_loss = self.saved.new_ones(())
            results = Backward(grad_loss.contiguous(), self.saved, gradient)
            objective.backward_kernel("native", arguments, results, written and not on_cpu)
        return gradient


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
        self.backward_kernel, self.operator = backward, operator
        self.metrics, self._forward_kernel = metrics, forward
        self._n_tensors, self._n_metrics = self.declared.n_tensors, len(metrics)
        members = {"forward": staticmethod(_forward), "backward": staticmethod(_backward)}
        function = type(name, (torch.autograd.Function,), members)
        self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]  # see operators.Operator

    def __call__(self, given: PolicyArguments | NftArguments, backend: str) -> tuple[Tensor, Tensor] | None:
        """Loss and metrics of an ordinary call, or None."""
        n, model_output, advantages = self._n_tensors, given.model_output, given.advantages
        inputs: tuple[Any, ...] = given[:n]
        tensors = [t for t in inputs if t is not None]
        if advantages is None or not _may_run(backend, tensors):
            return None
        try:
            arguments = walkable(given, self.declared)
            batch = model_output.shape[0]
            empty = advantages.new_empty
            loss = empty(batch) if given.unreduced else torch.empty_like(_number(model_output.device))
            metrics, saved = empty(self._n_metrics), empty(given.saved_rows * batch)
            differentiable = model_output.requires_grad and torch.is_grad_enabled()
            gradient = empty_like(arguments.model_output, given.channel_dim) if differentiable else None
            self._forward_kernel("native", arguments, (loss, metrics, saved), gradient)
        except REJECTED:
            return None
        if gradient is None:
            return loss, metrics
        constant = constants(*inputs[1:]) if WATCH.requires_grad(*tensors[1:]) else inputs[1:]
        return self._apply(model_output, Pass(self, constant, given[n:], loss, saved, gradient)), metrics

    def constants(self, arguments: Any) -> Any:
        """The arguments, of which only model_output is differentiated."""
        n = self.declared.n_tensors
        return arguments._make((arguments.model_output, *constants(*arguments[1:n]), *arguments[n:]))


def _forward(ctx: Any, model_output: Tensor, done: Pass) -> Tensor | None:
    loss, tensors = done.loss, done.tensors
    done.loss = done.tensors = None
    ctx.done = done
    ctx.save_for_backward(model_output, *tensors)
    ctx.set_materialize_grads(False)
    return loss


def _backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, None]:
    done = ctx.done
    if done.freed:
        raise RuntimeError(FREED)
    tensors = ctx.saved_tensors  # raises an error if an input was modified in place, or if the graph was freed
    if grad_loss is None:
        return None, None
    if torch.is_grad_enabled() or not (is_direct([grad_loss]) and grad_loss.data_ptr()):
        saved = done.saved.view(-1, tensors[0].shape[0])
        return done.objective.operator(grad_loss, saved, *tensors, *done.scalars, "native"), None
    return done.differentiate(tensors, grad_loss), None


def backward(loss: Tensor, scale: float | Tensor) -> bool:
    """``(loss * scale).backward()`` without the node of the loss; False if the loss is not that of an ordinary call."""
    node = loss.grad_fn
    done = getattr(node, "done", None)
    if not isinstance(done, Pass) or not is_direct([loss]):
        return False
    if done.freed:
        raise RuntimeError(FREED)
    tensors = node.saved_tensors  # type: ignore[union-attr]  # see _backward
    grad_loss = None
    if isinstance(scale, Tensor):
        grad_loss = scale.to(loss.device, torch.float32).reshape(())
    elif scale != 1.0:
        grad_loss = loss.new_full((), scale, requires_grad=False)
    gradient = done.differentiate(tensors, grad_loss)
    done.freed = True
    run_backward(tensors[0], gradient)
    return True


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
