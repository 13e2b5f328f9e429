"""PyTorch's own fused attention, with its log-sum-exp. The only file that touches these private operators.

A backend is a pair of functions in layout [B, H, S, D]: ``forward`` gives the output and the natural log-sum-exp, and
``backward`` takes a gradient for each of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CPU_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention on a CPU: the output, like query, and its log-sum-exp, float32 [B, H, Sq]."""
    if key_mask is None:
        return _CPU_FORWARD(query, key, value, scale=scale)
    out, lse = _CPU_FORWARD(query, key, value, attn_mask=_additive(key_mask, query.dtype), scale=scale)
    # PyTorch gives 0 where no key takes part.
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
    """Gradients of both results on a CPU, float32, without a matrix of size [Sq, Sk].

    dS = P (dO V^T - rowsum(dO O) + dlse). PyTorch's backward knows only the output, so dlse enters as one more column:
    dO' = [dO, 1], V' = [V, 0], O' = [O, -dlse]. The arithmetic is float32 throughout: PyTorch's 16-bit backward on a
    CPU is several times slower and no more exact.
    """
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    query, key, value, out = query.float(), key.float(), value.float(), out.float()
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.float()
    width = query.shape[-1]
    if grad_lse is not None:
        query, key, value = (torch.nn.functional.pad(t, (0, 1)) for t in (query, key, value))
        out = torch.cat([out, -grad_lse[..., None]], dim=-1)
        grad_out = torch.nn.functional.pad(grad_out, (0, 1), value=1.0)
    grads = _CPU_BACKWARD(
        grad_out, query, key, value, out, lse, 0.0, False, attn_mask=_additive(key_mask, query.dtype), scale=scale
    )
    return tuple(g[..., :width] for g in grads)


def _additive(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as PyTorch's kernels take it: [B, 1, 1, Sk], 0 or -inf."""
    if key_mask is None:
        return None
    zeros = torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device)
    return zeros.masked_fill(~key_mask, float("-inf"))[:, None, None]
