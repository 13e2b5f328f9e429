"""The policy operators as PyTorch sees them: schema, shapes, autograd. Arguments are validated by the callers.

The forward pass keeps one number per sample for the backward pass, which recomputes the residuals from the inputs:
no more memory is read than when a gradient is written early and scaled later, and none is held in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.operators import Operator

_OBJECTIVE = (
    "Tensor model_output, Tensor sample, Tensor prev_sample, Tensor old_log_prob, Tensor advantages, "
    "Tensor coefficients, Tensor? weights, Tensor? ref_model_output, int channel_dim, bool per_location, "
    "float clip_low, float clip_high, float advantage_clip, float kl_coef"
)
_INPUTS = _OBJECTIVE.count(",") + 1


def weighted_policy_loss(*objective: Any) -> tuple[Tensor, Tensor, Tensor]:
    prepared = _prepare(*objective)
    model_output = prepared[0]
    results = _results(model_output)
    if model_output.device.type == "cuda":
        library = _library(model_output)
        batch, positions = model_output.shape[0], model_output.numel() // model_output.shape[0]
        positions //= model_output.shape[prepared[8]]
        size = library.policy_workspace_bytes(batch, positions)
        partial = torch.empty(size, dtype=torch.uint8, device=model_output.device)
        library.policy_forward(*prepared, partial, native.zero_counter(model_output.device), *results)
    else:
        _library(model_output).policy_forward(*prepared, native.threads(), *results)
    return results


def weighted_policy_loss_backward(grad_loss: Tensor, slope: Tensor, *objective: Any) -> Tensor:
    prepared = _prepare(*objective)
    gradient = torch.empty_like(prepared[0])
    if gradient.device.type == "cuda":
        _library(gradient).policy_backward(*prepared, grad_loss, slope, gradient)
    else:
        _library(gradient).policy_backward(*prepared, native.threads(), grad_loss, slope, gradient)
    return gradient


def sample_transition(
    model_output: Tensor, sample: Tensor, noise: Tensor, coefficients: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor]:
    results = sample_transition_fake(model_output, sample, noise, coefficients, channel_dim)
    latents = (_collapsible(t, channel_dim) for t in (model_output, sample, noise))
    if model_output.device.type == "cuda":
        _library(model_output).sample_transition(*latents, coefficients.contiguous(), channel_dim, *results)
    else:
        _library(model_output).sample_transition(
            *latents, coefficients.contiguous(), channel_dim, native.threads(), *results
        )
    return results


def weighted_policy_loss_fake(model_output: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _results(model_output)


def weighted_policy_loss_backward_fake(grad_loss: Tensor, slope: Tensor, *objective: Any) -> Tensor:
    return torch.empty_like(_collapsible(objective[0], objective[8]))


def sample_transition_fake(
    model_output: Tensor, sample: Tensor, noise: Tensor, coefficients: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor]:
    locations = [n for d, n in enumerate(model_output.shape) if d != channel_dim]
    return torch.empty_like(_collapsible(sample, channel_dim)), model_output.new_empty(locations, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.channel_dim, ctx.per_location, ctx.clip_low, ctx.clip_high, ctx.advantage_clip, ctx.kl_coef = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * _INPUTS
    gradient = WEIGHTED_POLICY_LOSS_BACKWARD(
        grad_loss,
        *ctx.saved_tensors,
        ctx.channel_dim,
        ctx.per_location,
        ctx.clip_low,
        ctx.clip_high,
        ctx.advantage_clip,
        ctx.kl_coef,
    )
    return (gradient, *(None,) * (_INPUTS - 1))


def _library(tensor: Tensor) -> Any:
    """The compiled functions for the tensor's device; the caller has made sure that they are there."""
    return native.cuda() if tensor.is_cuda else native.cpu()


def _results(model_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics and the slope of each sample, unwritten."""
    shapes = ((), (6,), (model_output.shape[0],))
    loss, metrics, slope = (model_output.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return loss, metrics, slope


def _prepare(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    coefficients: Tensor,
    weights: Tensor | None,
    ref_model_output: Tensor | None,
    channel_dim: int,
    *scalars: Any,
) -> tuple[Any, ...]:
    """The objective's arguments as the compiled functions take them: in layouts that they can walk."""
    return (
        _collapsible(model_output, channel_dim),
        _collapsible(sample, channel_dim),
        _collapsible(prev_sample, channel_dim),
        old_log_prob.contiguous(),
        advantages.contiguous(),
        coefficients.contiguous(),
        None if weights is None else weights.contiguous(),
        None if ref_model_output is None else _collapsible(ref_model_output, channel_dim),
        channel_dim,
        *scalars,
    )


def _collapsible(tensor: Tensor, channel_dim: int) -> Tensor:
    """The tensor, copied if its locations do not follow one another at one stride."""
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


_DEVICES = ("CPU", "CUDA")
WEIGHTED_POLICY_LOSS_BACKWARD = Operator(
    f"weighted_policy_loss_backward(Tensor grad_loss, Tensor slope, {_OBJECTIVE}) -> Tensor",
    weighted_policy_loss_backward,
    weighted_policy_loss_backward_fake,
    devices=_DEVICES,
)
WEIGHTED_POLICY_LOSS = Operator(
    f"weighted_policy_loss({_OBJECTIVE}) -> (Tensor loss, Tensor metrics, Tensor slope)",
    weighted_policy_loss,
    weighted_policy_loss_fake,
    setup_context=_save,
    backward=_differentiate,
    devices=_DEVICES,
)
SAMPLE_TRANSITION = Operator(
    "sample_transition(Tensor model_output, Tensor sample, Tensor noise, Tensor coefficients, int channel_dim) "
    "-> (Tensor prev_sample, Tensor log_prob)",
    sample_transition,
    sample_transition_fake,
    devices=_DEVICES,
)
