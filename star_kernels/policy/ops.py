"""The policy operators as PyTorch sees them: schema, shapes, autograd.

The forward pass of an operator saves a few numbers per sample for the backward pass, which computes the residuals again
from the inputs; no gradient is stored in between. Ordinary calls of the losses need one pass, see direct.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from star_kernels.operators import Operator
from star_kernels.policy import kernels, naive
from star_kernels.policy.arguments import (
    Backward,
    Declaration,
    Forward,
    NftArguments,
    PolicyArguments,
    SampleArguments,
)
from star_kernels.policy.checks import check_operator
from star_kernels.policy.layouts import collapsible, empty_like, walkable

_DEVICES = ("CPU", "CUDA")


class _Objective:
    """The forward and the backward operator of one objective."""

    def __init__(
        self,
        name: str,
        arguments: type[PolicyArguments] | type[NftArguments],
        *,
        n_metrics: int,
        forward: Callable[[str, Any, Forward], None],
        backward: Callable[[str, Any, Backward], None],
    ) -> None:
        self._arguments: Any = arguments
        self._declared = declared = Declaration(arguments)
        self._n_metrics, self._forward_kernel, self._backward_kernel = n_metrics, forward, backward
        schema = f"{declared.schema}, str backend"
        self.backward: Operator = Operator(
            f"{name}_backward(Tensor grad_loss, Tensor saved, {schema}) -> Tensor",
            self._run_backward,
            self._shape_backward,
            check=self._check_backward,
            devices=_DEVICES,
        )
        self.forward: Operator = Operator(
            f"{name}({schema}) -> (Tensor loss, Tensor metrics, Tensor saved)",
            self._run,
            self._shapes,
            check=self._check,
            setup_context=self._save,
            backward=self._differentiate,
            devices=_DEVICES,
        )

    def _check(self, *flat: Any) -> None:
        check_operator(self._arguments._make(flat[:-1]), self._declared)

    def _check_backward(self, grad_loss: Tensor, saved: Tensor, *flat: Any) -> None:
        self._check(*flat)
        arguments = self._arguments._make(flat[:-1])
        batch, device = arguments.model_output.shape[0], arguments.model_output.device
        loss = [batch] if arguments.unreduced else []
        for name, tensor, shape in (("grad_loss", grad_loss, loss), ("saved", saved, [arguments.saved_rows, batch])):
            if list(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device != device:
                raise ValueError(
                    f"{name} must be a float32 tensor of shape {shape} on {device}, "
                    f"got {tensor.dtype}, {list(tensor.shape)} on {tensor.device}"
                )

    def _run(self, *flat: Any) -> Forward:
        arguments = walkable(self._arguments._make(flat[:-1]), self._declared)
        results = self._results(arguments)
        self._forward_kernel(flat[-1], arguments, results)
        return results

    def _shapes(self, *flat: Any) -> Forward:
        return self._results(self._arguments._make(flat[:-1]))

    def _results(self, arguments: Any) -> Forward:
        """Loss, metrics and saved, uninitialised."""
        model_output = arguments.model_output
        batch, empty = model_output.shape[0], model_output.new_empty
        return Forward(
            empty((batch,) if arguments.unreduced else (), dtype=torch.float32),
            empty((self._n_metrics,), dtype=torch.float32),
            empty((arguments.saved_rows, batch), dtype=torch.float32),
        )

    def _run_backward(self, grad_loss: Tensor, saved: Tensor, *flat: Any) -> Tensor:
        arguments = walkable(self._arguments._make(flat[:-1]), self._declared)
        gradient = empty_like(arguments.model_output, arguments.channel_dim)
        self._backward_kernel(flat[-1], arguments, Backward(grad_loss.contiguous(), saved, gradient))
        return gradient

    def _shape_backward(self, grad_loss: Tensor, saved: Tensor, *flat: Any) -> Tensor:
        arguments = self._arguments._make(flat[:-1])
        return empty_like(collapsible(arguments.model_output, arguments.channel_dim), arguments.channel_dim)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
        _, metrics, saved = output
        n = self._declared.n_tensors
        ctx.save_for_backward(saved, *inputs[:n])
        ctx.scalars = inputs[n:]
        ctx.mark_non_differentiable(metrics, saved)
        ctx.set_materialize_grads(False)

    def _differentiate(self, ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        others = (None,) * self._declared.n_arguments  # and the backend, less model_output
        if grad_loss is None:
            return (None, *others)
        return (self.backward(grad_loss, *ctx.saved_tensors, *ctx.scalars), *others)


def sample_transition(arguments: SampleArguments, backend: str) -> tuple[Tensor, Tensor]:
    """The sampling step on a backend."""
    arguments = walkable(arguments, SAMPLE)
    results = _sample_results(arguments)
    kernels.sample_transition(backend, arguments, *results)
    return results


def _sample_results(arguments: SampleArguments) -> tuple[Tensor, Tensor]:
    """prev_sample and log_prob, uninitialised."""
    channel_dim, shape = arguments.channel_dim, arguments.model_output.shape
    locations = shape[:channel_dim] + shape[channel_dim + 1 :]
    return empty_like(arguments.sample, channel_dim), arguments.coefficients.new_empty(locations)


def _sample_transition(*flat: Any) -> tuple[Tensor, Tensor]:
    return sample_transition(SampleArguments._make(flat[:-1]), flat[-1])


def _sample_shapes(*flat: Any) -> tuple[Tensor, Tensor]:
    arguments = SampleArguments._make(flat[:-1])
    return _sample_results(arguments._replace(sample=collapsible(arguments.sample, arguments.channel_dim)))


def _check_sample(*flat: Any) -> None:
    check_operator(SampleArguments._make(flat[:-1]), SAMPLE)


_POLICY = _Objective(
    "weighted_policy_loss",
    PolicyArguments,
    n_metrics=len(naive.METRICS),
    forward=kernels.policy_forward,
    backward=kernels.policy_backward,
)
_NFT = _Objective(
    "weighted_nft_loss",
    NftArguments,
    n_metrics=len(naive.NFT_METRICS),
    forward=kernels.nft_forward,
    backward=kernels.nft_backward,
)
SAMPLE = Declaration(SampleArguments)
WEIGHTED_POLICY_LOSS, WEIGHTED_POLICY_LOSS_BACKWARD = _POLICY.forward, _POLICY.backward
WEIGHTED_NFT_LOSS, WEIGHTED_NFT_LOSS_BACKWARD = _NFT.forward, _NFT.backward
SAMPLE_TRANSITION = Operator(
    f"sample_transition({SAMPLE.schema}, str backend) -> (Tensor prev_sample, Tensor log_prob)",
    _sample_transition,
    _sample_shapes,
    check=_check_sample,
    devices=_DEVICES,
)
