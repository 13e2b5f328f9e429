"""The sampling step: the next latent, and its log-probability at every location."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.operators import constants
from star_kernels.policy import direct, naive, ops
from star_kernels.policy.arguments import SampleArguments
from star_kernels.policy.backends import resolve_backend
from star_kernels.policy.checks import check_latent, check_tensors, check_transition, resolve_channel_dim
from star_kernels.policy.transitions import Transition


def sample_transition(
    model_output: Tensor,
    sample: Tensor,
    transition: Transition,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    channel_dim: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One denoising step: draws ``prev ~ N(a x + b v, std^2)`` and computes its log-probability at every location.

    The log-probability is that of the returned value, after rounding to the sample's dtype, so that the policy ratio
    of an unchanged model is exactly one. The results are not differentiable, in reverse mode or forward mode.

    Args:
        model_output: velocity ``[B, C, H, W]``, ``[B, C, F, H, W]`` or packed ``[B, S, C]`` with ``channel_dim=-1``.
        sample: the current latent, of that shape; both float32, float16 or bfloat16 (float32 latents are advised).
        transition: the sampler's coefficients, see :func:`flow_sde`.
        noise: standard normal, of that shape; drawn in float32 with ``generator`` if not given.
        channel_dim: the dimension that log-probabilities are averaged over.
        backend: "auto", "native" (compiled kernels), "triton" (on CUDA) or "naive" (plain PyTorch).

    Returns:
        ``(prev_sample, log_prob)``: like sample, and float32 ``[B, *locations]``.
    """
    channel_dim = resolve_channel_dim(channel_dim, model_output)
    check_transition(transition)
    if noise is None:
        check_latent("sample", sample, model_output)
        wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
        # What torch.randn does; with symbolic sizes it does not accept a generator, even if that is None.
        noise = torch.empty(sample.shape, dtype=wide, device=sample.device).normal_(generator=generator)
    elif generator is not None:
        raise ValueError("generator must be None if noise is given, got both")
    arguments = SampleArguments(model_output, sample, noise, transition.coefficients, channel_dim)
    found = direct.sample_transition(arguments, backend)
    if found is not None:
        return found
    check_tensors(arguments, ops.SAMPLE)
    backend = resolve_backend(backend, model_output)
    model_output, sample, noise, table = constants(*arguments[: ops.SAMPLE.n_tensors])
    arguments = SampleArguments(model_output, sample, noise, table, channel_dim)
    if backend == "naive":
        return naive.sample_transition(arguments)
    prev_sample, log_prob = ops.SAMPLE_TRANSITION(*arguments, backend)
    return prev_sample, log_prob
