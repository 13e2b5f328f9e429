"""The policy operators as PyTorch sees them: schema, shapes, autograd.

The forward pass saves a few numbers per sample for the backward pass, which recomputes the residuals from the inputs.
That reads no more memory than writing a gradient early and scaling it later, and no gradient is stored in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from star_kernels.checks import repeats
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
        check_operator(self._arguments._make(flat[:-1]), self._declared.kinds)

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
        arguments = _walkable(self._arguments, self._declared, flat)
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
        arguments = _walkable(self._arguments, self._declared, flat)
        gradient = _empty_like(arguments.model_output, arguments.channel_dim)
        self._backward_kernel(flat[-1], arguments, Backward(grad_loss.contiguous(), saved, gradient))
        return gradient

    def _shape_backward(self, grad_loss: Tensor, saved: Tensor, *flat: Any) -> Tensor:
        arguments = self._arguments._make(flat[:-1])
        return _empty_like(_collapsible(arguments.model_output, arguments.channel_dim), arguments.channel_dim)

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


def _sample_transition(
    model_output: Tensor, sample: Tensor, noise: Tensor, coefficients: Tensor, channel_dim: int, backend: str
) -> tuple[Tensor, Tensor]:
    results = _sample_shapes(model_output, sample, noise, coefficients, channel_dim, backend)
    model_output, sample, noise = (_collapsible(t, channel_dim) for t in (model_output, sample, noise))
    arguments = SampleArguments(model_output, sample, noise, coefficients.contiguous(), channel_dim)
    kernels.sample_transition(backend, arguments, *results)
    return results


def _sample_shapes(
    model_output: Tensor, sample: Tensor, noise: Tensor, coefficients: Tensor, channel_dim: int, backend: str
) -> tuple[Tensor, Tensor]:
    locations = [n for d, n in enumerate(model_output.shape) if d != channel_dim]
    prev_sample = _empty_like(_collapsible(sample, channel_dim), channel_dim)
    return prev_sample, model_output.new_empty(locations, dtype=torch.float32)


def _check_sample(*flat: Any) -> None:
    check_operator(SampleArguments._make(flat[:-1]), _SAMPLE.kinds)


def _walkable(arguments: Any, declared: Declaration, flat: tuple[Any, ...]) -> Any:
    """The arguments in memory layouts that the kernels can walk, from those of an operator."""
    n = declared.n_tensors
    channel_dim = flat[n]
    tensors = [
        t if t is None else _collapsible(t, channel_dim) if latent else t.contiguous()
        for t, latent in zip(flat, declared.is_latent, strict=False)
    ]
    return arguments._make((*tensors, *flat[n:-1]))


def _collapsible(tensor: Tensor, channel_dim: int) -> Tensor:
    """The tensor, copied if its location dimensions do not collapse into one stride."""
    if tensor.is_contiguous() and channel_dim in (1, tensor.ndim - 1):
        return tensor
    expected: int | None = None
    for d in range(tensor.ndim - 1, 0, -1):
        size = tensor.shape[d]
        if d == channel_dim or size == 1:
            continue
        stride = tensor.stride(d)
        if expected is not None and stride != expected:
            return tensor.movedim(channel_dim, 1).contiguous().movedim(1, channel_dim)
        expected = stride * size
    return tensor


def _empty_like(tensor: Tensor, channel_dim: int) -> Tensor:
    """Uninitialised memory in the layout of a collapsible latent, or channels first if its elements share memory."""
    if not repeats(tensor):
        return torch.empty_like(tensor)
    channels_first = tensor.movedim(channel_dim, 1)
    return channels_first.new_empty(channels_first.shape).movedim(1, channel_dim)


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
_SAMPLE = Declaration(SampleArguments)
WEIGHTED_POLICY_LOSS, WEIGHTED_POLICY_LOSS_BACKWARD = _POLICY.forward, _POLICY.backward
WEIGHTED_NFT_LOSS, WEIGHTED_NFT_LOSS_BACKWARD = _NFT.forward, _NFT.backward
SAMPLE_TRANSITION = Operator(
    f"sample_transition({_SAMPLE.schema}, str backend) -> (Tensor prev_sample, Tensor log_prob)",
    _sample_transition,
    _sample_shapes,
    check=_check_sample,
    devices=_DEVICES,
)
