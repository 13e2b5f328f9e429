"""The kernels of the policy operators on each backend. Each call writes the given results.

The compiled functions take the fields of the arguments in their declared order, and then the results. A compiled
forward pass also writes the gradient for an upstream gradient of ones, if memory for it is given. A compiled backward
pass whose gradient is already ``written`` keeps it if ``grad_loss`` is all ones, and computes it again otherwise. The
Triton kernels have neither.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.counters import zero_counters
from star_kernels.policy.arguments import Backward, Forward, NftArguments, PolicyArguments, SampleArguments


def policy_forward(backend: str, arguments: PolicyArguments, results: Forward, gradient: Tensor | None = None) -> None:
    if backend == "triton":
        from star_kernels.policy import triton_loss

        triton_loss.policy_forward(arguments, results)
    elif arguments.model_output.is_cuda:
        library = native.cuda()
        workspace = _workspace(library.policy_workspace_bytes, arguments, arguments.phrases)
        library.policy_forward(*arguments, *workspace, *results, gradient)
    else:
        native.cpu().policy_forward(*arguments, native.threads(), *results, gradient)


def policy_backward(backend: str, arguments: PolicyArguments, results: Backward, written: bool = False) -> None:
    if backend == "triton":
        from star_kernels.policy import triton_gradient

        triton_gradient.policy_backward(arguments, results)
    elif arguments.model_output.is_cuda:
        native.cuda().policy_backward(*arguments, *results, written)
    else:
        native.cpu().policy_backward(*arguments, native.threads(), *results, written)


def nft_forward(backend: str, arguments: NftArguments, results: Forward, gradient: Tensor | None = None) -> None:
    if backend == "triton":
        from star_kernels.policy import triton_nft

        triton_nft.nft_forward(arguments, results)
    elif arguments.model_output.is_cuda:
        library = native.cuda()
        workspace = _workspace(library.nft_workspace_bytes, arguments)
        library.nft_forward(*arguments, *workspace, *results, gradient)
    else:
        native.cpu().nft_forward(*arguments, native.threads(), *results, gradient)


def nft_backward(backend: str, arguments: NftArguments, results: Backward, written: bool = False) -> None:
    if backend == "triton":
        from star_kernels.policy import triton_nft

        triton_nft.nft_backward(arguments, results)
    elif arguments.model_output.is_cuda:
        native.cuda().nft_backward(*arguments, *results, written)
    else:
        native.cpu().nft_backward(*arguments, native.threads(), *results, written)


def sample_transition(backend: str, arguments: SampleArguments, prev_sample: Tensor, log_prob: Tensor) -> None:
    if backend == "triton":
        from star_kernels.policy import triton_sampling

        triton_sampling.sample_transition(arguments, prev_sample, log_prob)
    elif arguments.model_output.is_cuda:
        native.cuda().sample_transition(*arguments, prev_sample, log_prob)
    else:
        native.cpu().sample_transition(*arguments, native.threads(), prev_sample, log_prob)


def _workspace(
    workspace_bytes: Callable[..., int], arguments: PolicyArguments | NftArguments, *phrases: int
) -> tuple[Tensor, Tensor]:
    """Memory for the sums of a CUDA kernel's tiles, and the counter by which its last block knows that it is last."""
    model_output = arguments.model_output
    batch = model_output.shape[0]
    positions = model_output.numel() // (batch * model_output.shape[arguments.channel_dim])
    partial = torch.empty(workspace_bytes(batch, positions, *phrases), dtype=torch.uint8, device=model_output.device)
    return partial, zero_counters(model_output.device)
