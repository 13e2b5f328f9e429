"""PyTorch's own fused attention, with its log-sum-exp. The only file that calls these private operators.

A kernel is a pair of functions in layout [B, H, S, D]: the forward function returns the output and the natural
log-sum-exp, the backward function takes the gradient of the output. The two backward functions that compute in float32
take the gradient of the log-sum-exp too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = ("cudnn", "flash", "efficient")  # on CUDA
LSE_ALIGNMENT = 32 if torch.version.hip is None else 1  # the efficient kernel pads its log-sum-exp to a multiple

_LEAST = torch.finfo(torch.float32).min
_CPU_FORWARD = torch._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# The operators are called by position. These are their arguments in torch 2.11 to 2.13.
_ARGUMENTS = {
    "_scaled_dot_product_flash_attention": "query key value dropout_p is_causal return_debug_mask scale",
    "_scaled_dot_product_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q "
    "max_k dropout_p is_causal philox_seed philox_offset scale",
    "_scaled_dot_product_cudnn_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal "
    "return_debug_mask scale",
    "_scaled_dot_product_cudnn_attention_backward": "grad_out query key value out logsumexp philox_seed philox_offset "
    "attn_bias cum_seq_q cum_seq_k max_q max_k dropout_p is_causal scale",
    "_scaled_dot_product_efficient_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal scale",
    "_scaled_dot_product_efficient_attention_backward": "grad_out_ query key value attn_bias out logsumexp philox_seed "
    "philox_offset dropout_p grad_input_mask is_causal scale",
}


def forward(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention on a CPU.

    Returns:
        The output, in the layout of query, and its log-sum-exp, float32 [B, H, Sq].
    """
    if key_mask is None:
        return _CPU_FORWARD(query, key, value, scale=scale)
    out, lse = _CPU_FORWARD(query, key, value, attn_mask=_additive(key_mask, query.dtype), scale=scale)
    # PyTorch returns 0 for rows without any key.
    return out, lse.masked_fill(~key_mask.any(dim=1)[:, None, None], float("-inf"))


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key and value on a CPU, in float32, from those of both results.

    No [Sq, Sk] matrix is materialised. PyTorch's 16-bit backward pass on a CPU is several times slower than this one,
    and no more exact.
    """
    if key_mask is not None:
        lse = lse.clamp(min=_LEAST)  # PyTorch computes exp(-inf - lse) for a row without any key: 0, not NaN
    saved = _float32(grad_out, grad_lse, query, key, value, out, columns=1)
    mask = _additive(key_mask, torch.float32)
    dq, dk, dv = _CPU_BACKWARD(*saved, lse, 0.0, False, attn_mask=mask, scale=scale)
    width = query.shape[-1]
    return (dq, dk, dv) if dq.shape[-1] == width else (dq[..., :width], dk[..., :width], dv[..., :width])


def cuda_float32_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key and value by the efficient kernel, from those of both results.

    In float32, as 16 bits would round the gradient of the log-sum-exp.
    """
    saved = _float32(grad_out, grad_lse, query, key, value, out, columns=4)  # rows start at multiples of 16 bytes
    dq, dk, dv = cuda_backward("efficient", *saved, lse, scale)
    width = query.shape[-1]
    return dq[..., :width], dk[..., :width], dv[..., :width]


def _float32(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments with which PyTorch's backward pass, which takes only dO, computes the gradient of both results.

    dS = P (dO V^T - rowsum(dO O) + dlse), so dlse is passed as the first of ``columns`` additional columns (the others
    are 0): dO' = [dO, 1], V' = [V, 0], O' = [O, -dlse].
    """
    if query.dtype != torch.float32:
        query, key, value, out = query.float(), key.float(), value.float(), out.float()
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.float()
    if grad_lse is not None:
        # F.pad takes heads of one element for an image with channels last, and would return that layout.
        query, key, value = (F.pad(t, (0, columns)).contiguous() for t in (query, key, value))
        out = F.pad(torch.cat([out, -grad_lse[..., None]], dim=-1), (0, columns - 1))
        grad_out = F.pad(grad_out, (0, columns), value=1.0)
    return grad_out, query, key, value, out


def cuda_forward(kernel: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention by one of KERNELS.

    Returns:
        The output, in a layout that the kernel chooses, and its log-sum-exp, float32 [B, H, Sq].
    """
    results: Any
    query, scale = _positive_scale(query, scale)
    if kernel == "flash":
        results = _operator("flash_attention")(query, key, value, 0.0, False, False, scale=scale)
    elif kernel == "cudnn":
        results = _operator("cudnn_attention")(query, key, value, None, True, 0.0, False, False, scale=scale)
    else:
        results = _operator("efficient_attention")(query, key, value, None, True, 0.0, False, scale=scale)
    out, lse = results[:2]
    if lse.ndim == 4:  # cuDNN returns [B, H, Sq, 1]
        lse = lse.squeeze(-1)
    return out, lse.narrow(2, 0, query.shape[2])


def cuda_backward(
    kernel: str, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key and value by one of KERNELS; any of them may have computed out and lse."""
    if scale <= 0:
        turned, positive = _positive_scale(query, scale)
        grad_query, *grads = cuda_backward(kernel, grad_out, turned, key, value, out, lse, positive)
        return -grad_query, grads[0], grads[1]
    saved = (grad_out, query, key, value)
    lengths = (query.shape[2], key.shape[2])
    random = _no_dropout(query.device, kernel)
    results: Any
    if kernel == "flash":
        results = _operator("flash_attention_backward")(
            *saved, out, lse.contiguous(), None, None, *lengths, 0.0, False, *random, scale=scale
        )
    elif kernel == "cudnn":
        lse = lse.contiguous().unsqueeze(-1)
        results = _operator("cudnn_attention_backward")(
            *saved, out, lse, *random, None, None, None, *lengths, 0.0, False, scale=scale
        )
    else:
        out = out.transpose(1, 2).contiguous().transpose(1, 2)  # the kernel assumes the strides of [B, S, H, D]
        lse = F.pad(lse, (0, -lse.shape[2] % LSE_ALIGNMENT), value=float("inf"))  # as in the efficient forward pass
        wanted = [True, True, True, False]
        results = _operator("efficient_attention_backward")(
            *saved, None, out, lse.contiguous(), *random, 0.0, wanted, False, scale=scale
        )
    return results[0], results[1], results[2]


def flash_implementation() -> str:
    """Which flash attention PyTorch runs: FA2, or the one set by ``activate_flash_attention_impl`` (torch 2.13)."""
    current: Callable[[], str | None] | None = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return (current() if current is not None else None) or "FA2"


@cache
def _operator(name: str) -> Any:
    """A private operator, after a check of its signature.

    Raises:
        RuntimeError: this version of torch has another signature.
    """
    name = f"_scaled_dot_product_{name}"
    operator = getattr(torch.ops.aten, name).default
    arguments = " ".join(argument.name for argument in operator._schema.arguments)
    if arguments != _ARGUMENTS[name]:
        raise RuntimeError(
            f"{name} of torch {torch.__version__} must take the arguments {_ARGUMENTS[name]}, got {arguments}; use "
            "backend='triton'"
        )
    return operator


def _positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Query and scale with the same scores and a positive scale: the kernels take row maxima before scaling."""
    if scale < 0:
        query, scale = -query, -scale
    return query, max(scale, 1e-30)


@cache
def _no_dropout(device: torch.device, kernel: str) -> tuple[Tensor, Tensor]:
    """The state of a random generator, which is not used, in the dtype that the kernel requires."""
    if kernel == "flash":
        return torch.zeros(2, dtype=torch.uint64, device=device), torch.zeros((), dtype=torch.uint64, device=device)
    return torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)


def _additive(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask that PyTorch's kernels add to the scores: [B, 1, 1, Sk], 0 or -inf."""
    if key_mask is None:
        return None
    zeros = torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device)
    return zeros.masked_fill(~key_mask, float("-inf"))[:, None, None]
