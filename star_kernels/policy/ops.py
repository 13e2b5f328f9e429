"""The policy operators as PyTorch sees them: schema, shapes, autograd.

The forward pass keeps a few numbers per sample for the backward pass, which recomputes the residuals from the inputs:
no more memory is read than when a gradient is written early and scaled later, and none is held in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.checks import repeats
from star_kernels.operators import Operator
from star_kernels.policy import naive
from star_kernels.policy.checks import check_operator

# Tensors, then scalars, in the order of star_kernels.policy.naive and of the compiled functions.
_POLICY_TENSORS = (
    "Tensor model_output, Tensor sample, Tensor prev_sample, Tensor old_log_prob, Tensor advantages, "
    "Tensor coefficients, Tensor? weights, Tensor? mask, Tensor? step_weights, Tensor? old_model_output, "
    "Tensor? ref_model_output"
)
_POLICY_SCALARS = (
    "int channel_dim, bool per_location, bool weighted_kl, bool per_sample, float clip_low, float clip_high, "
    "float advantage_clip, float kl_coef"
)
_POLICY_LATENTS = (0, 1, 2, 9, 10)  # tensors of the latent's shape
_POLICY_STATISTICS = 2  # rows of [., B]: d loss / d log-ratio; one over the number of locations that count
_NFT_TENSORS = (
    "Tensor model_output, Tensor old_model_output, Tensor target, Tensor advantages, Tensor sigma, Tensor? weights, "
    "Tensor? mask, Tensor? step_weights, Tensor? ref_model_output"
)
_NFT_SCALARS = (
    "int channel_dim, bool adaptive, bool weighted_kl, bool per_sample, float beta, float advantage_clip, float kl_coef"
)
_NFT_LATENTS = (0, 1, 2, 8)
_NFT_STATISTICS = 3  # factors of (v_old - target) and of (v - v_old); one over the number of locations that count


class _Objective:
    """The operators of one objective, forward and backward, and what differs between objectives."""

    def __init__(
        self, name: str, function: str, tensors: str, scalars: str, latents: tuple[int, ...], metrics: int, rows: int
    ) -> None:
        self._function, self._latents, self._metrics, self._rows = function, latents, metrics, rows
        self._names = [tensor.split()[-1] for tensor in tensors.split(", ")]
        self._tensors = len(self._names)
        self._inputs = self._tensors + scalars.count(",") + 2  # and the backend
        self._per_sample = self._tensors + [s.split()[-1] for s in scalars.split(", ")].index("per_sample")
        arguments = f"{tensors}, {scalars}, str backend"
        self.backward: Operator = Operator(
            f"{name}_backward(Tensor grad_loss, Tensor statistics, {arguments}) -> Tensor",
            self._run_backward,
            self._shape_backward,
            check=self._check_backward,
            devices=_DEVICES,
        )
        self.forward: Operator = Operator(
            f"{name}({arguments}) -> (Tensor loss, Tensor metrics, Tensor statistics)",
            self._run,
            self._shapes,
            check=self._check,
            setup_context=self._save,
            backward=self._differentiate,
            devices=_DEVICES,
        )

    def _check(self, *arguments: Any) -> None:
        n = self._tensors
        check_operator(
            self._names, arguments[:n], self._latents, channel_dim=arguments[n], per_location=arguments[n + 1]
        )

    def _check_backward(self, grad_loss: Tensor, statistics: Tensor, *arguments: Any) -> None:
        self._check(*arguments)
        batch = arguments[0].shape[0]
        loss = [batch] if arguments[self._per_sample] else []
        for name, tensor, shape in (("grad_loss", grad_loss, loss), ("statistics", statistics, [self._rows, batch])):
            if list(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device != arguments[0].device:
                raise ValueError(
                    f"{name} must be a float32 tensor of shape {shape} on {arguments[0].device}, "
                    f"got {tensor.dtype}, {list(tensor.shape)} on {tensor.device}"
                )

    def _run(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *objective, backend = self._prepare(arguments)
        results = self._shapes(*arguments)
        _call(f"{self._function}_forward", backend, objective, results, self._workspace(objective, backend))
        return results

    def _workspace(self, objective: list[Any], backend: str) -> tuple[Tensor, ...]:
        """Of the CUDA kernel: room for the sums of its tiles, and a counter that tells the last of them that it is."""
        model_output = objective[0]
        if backend != "native" or not model_output.is_cuda:
            return ()
        batch = model_output.shape[0]
        positions = model_output.numel() // (batch * model_output.shape[objective[self._tensors]])
        size = getattr(native.cuda(), f"{self._function}_workspace_bytes")(batch, positions)
        partial = torch.empty(size, dtype=torch.uint8, device=model_output.device)
        return partial, native.zero_counter(model_output.device)

    def _shapes(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, metrics and statistics, unwritten."""
        model_output, batch = arguments[0], arguments[0].shape[0]
        loss = (batch,) if arguments[self._per_sample] else ()
        shapes = (loss, (self._metrics,), (self._rows, batch))
        loss, metrics, statistics = (model_output.new_empty(shape, dtype=torch.float32) for shape in shapes)
        return loss, metrics, statistics

    def _run_backward(self, grad_loss: Tensor, statistics: Tensor, *arguments: Any) -> Tensor:
        *objective, backend = self._prepare(arguments)
        gradient = _empty_like(objective[0], arguments[self._tensors])
        results = (grad_loss.contiguous(), statistics, gradient)
        _call(f"{self._function}_backward", backend, objective, results)
        return gradient

    def _shape_backward(self, grad_loss: Tensor, statistics: Tensor, *arguments: Any) -> Tensor:
        channel_dim = arguments[self._tensors]
        return _empty_like(_collapsible(arguments[0], channel_dim), channel_dim)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[2], *inputs[: self._tensors])
        ctx.scalars = inputs[self._tensors :]
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.set_materialize_grads(False)

    def _differentiate(self, ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * self._inputs
        gradient = self.backward(grad_loss, *ctx.saved_tensors, *ctx.scalars)
        return (gradient, *(None,) * (self._inputs - 1))

    def _prepare(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments in layouts that the kernels can walk."""
        channel_dim = arguments[self._tensors]
        prepared = list(arguments)
        for i in range(self._tensors):
            tensor = arguments[i]
            if tensor is not None:
                prepared[i] = _collapsible(tensor, channel_dim) if i in self._latents else tensor.contiguous()
        return tuple(prepared)


def sample_transition(
    model_output: Tensor, sample: Tensor, noise: Tensor, coefficients: Tensor, channel_dim: int, backend: str
) -> tuple[Tensor, Tensor]:
    results = sample_transition_fake(model_output, sample, noise, coefficients, channel_dim, backend)
    latents = (_collapsible(t, channel_dim) for t in (model_output, sample, noise))
    _call("sample_transition", backend, [*latents, coefficients.contiguous(), channel_dim], results)
    return results


def sample_transition_fake(
    model_output: Tensor, sample: Tensor, noise: Tensor, coefficients: Tensor, channel_dim: int, backend: str
) -> tuple[Tensor, Tensor]:
    locations = [n for d, n in enumerate(model_output.shape) if d != channel_dim]
    prev_sample = _empty_like(_collapsible(sample, channel_dim), channel_dim)
    return prev_sample, model_output.new_empty(locations, dtype=torch.float32)


def _check_sample(
    model_output: Tensor, sample: Tensor, noise: Tensor, coefficients: Tensor, channel_dim: int, backend: str
) -> None:
    names = ("model_output", "sample", "noise", "coefficients")
    check_operator(names, (model_output, sample, noise, coefficients), (0, 1, 2), channel_dim, False)


def _call(
    function: str,
    backend: str,
    arguments: list[Any],
    results: tuple[Tensor, ...],
    workspace: tuple[Tensor, ...] = (),
) -> None:
    """A kernel of the backend, which writes the results."""
    if backend == "triton":
        _triton(function)(*arguments, *results)
    elif arguments[0].is_cuda:
        getattr(native.cuda(), function)(*arguments, *workspace, *results)
    else:
        getattr(native.cpu(), function)(*arguments, native.threads(), *results)


def _triton(function: str) -> Callable[..., None]:
    from star_kernels.policy import triton_loss, triton_nft, triton_sampling

    for module in (triton_loss, triton_nft, triton_sampling):
        if hasattr(module, function):
            kernel: Callable[..., None] = getattr(module, function)
            return kernel
    raise AttributeError(function)


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


def _empty_like(tensor: Tensor, channel_dim: int) -> Tensor:
    """Memory for a result in the layout of a latent that the kernels can walk, or in one of theirs where it repeats."""
    if not repeats(tensor):
        return torch.empty_like(tensor)
    channels_first = tensor.movedim(channel_dim, 1)
    return channels_first.new_empty(channels_first.shape).movedim(1, channel_dim)


_DEVICES = ("CPU", "CUDA")
_POLICY = _Objective(
    "weighted_policy_loss",
    "policy",
    _POLICY_TENSORS,
    _POLICY_SCALARS,
    _POLICY_LATENTS,
    len(naive.METRICS),
    _POLICY_STATISTICS,
)
_NFT = _Objective(
    "weighted_nft_loss", "nft", _NFT_TENSORS, _NFT_SCALARS, _NFT_LATENTS, len(naive.NFT_METRICS), _NFT_STATISTICS
)
WEIGHTED_POLICY_LOSS, WEIGHTED_POLICY_LOSS_BACKWARD = _POLICY.forward, _POLICY.backward
WEIGHTED_NFT_LOSS, WEIGHTED_NFT_LOSS_BACKWARD = _NFT.forward, _NFT.backward
SAMPLE_TRANSITION = Operator(
    "sample_transition(Tensor model_output, Tensor sample, Tensor noise, Tensor coefficients, int channel_dim, "
    "str backend) -> (Tensor prev_sample, Tensor log_prob)",
    sample_transition,
    sample_transition_fake,
    check=_check_sample,
    devices=_DEVICES,
)
