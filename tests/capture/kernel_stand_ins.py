"""Functions with the signatures and results of the attention packages that diffusers calls, in plain PyTorch.

Each computes exact attention, and its log-sum-exp in the layout of its package.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import _HUB_KERNELS_REGISTRY, AttentionBackendName
from torch import Tensor

Found = tuple[Tensor, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Found:
    """Layout [B, S, H, D]; the log-sum-exp is [B, H, S]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q.float() @ k.float().mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(dim=-1) @ v.float()).to(q.dtype).transpose(1, 2).contiguous(), scores.logsumexp(dim=-1)


def packed(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, scale: float | None) -> Found:
    """Layout [total, H, D]; the log-sum-exp is [H, total]."""
    parts = []
    for i in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        parts.append(attend(q[None, rows], k[None, keys], v[None, keys], scale))
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


def flash_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    out, lse = attend(q, k, v, softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def flash_2_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    out, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def flash_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    out, lse = attend(q, k, v, softmax_scale)
    return (out, lse) if return_attn_probs else out


def flash_3_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    out, lse = packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
    return (out, lse) if return_attn_probs else out


def flash_3_varlen_early(*args, **kwargs):
    """The first versions return the log-sum-exp in any case."""
    return flash_3_varlen(*args, **kwargs, return_attn_probs=True)


def flash_4(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
):  # fmt: skip
    out, lse = attend(q, k, v, softmax_scale)
    return out, lse if return_lse or q.requires_grad else None


def aiter(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), bias=None, alibi_slopes=None,
    deterministic=True, return_lse=False, return_attn_probs=False,
):  # fmt: skip
    out, lse = attend(q, k, v, softmax_scale)
    return (out, lse) if return_lse else out


def sage(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "NHD"
    out, lse = attend(q, k, v, sm_scale)
    return (out, lse) if return_lse else out


def sage_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False, sm_scale=None, smooth_k=True,
    **kwargs,
):  # fmt: skip
    return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, sm_scale)[0]


def sage_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    out, _ = attend(*(t.transpose(1, 2) for t in (q, k, v)), None)
    k -= k.mean(dim=2, keepdim=True)  # it changes the keys
    return out.transpose(1, 2)


class XFormers:
    """The part of xformers.ops that diffusers calls."""

    @staticmethod
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_bias, scale=scale).transpose(1, 2)


FUNCTIONS: dict[str, Any] = {
    "flash_attn_func": flash_2,
    "flash_attn_varlen_func": flash_2_varlen,
    "flash_attn_3_func": flash_3,
    "flash_attn_3_varlen_func": flash_3_varlen,
    "sageattn": sage,
    "sageattn_qk_int8_pv_fp8_cuda": sage,
    "sageattn_qk_int8_pv_fp8_cuda_sm90": sage,
    "sageattn_qk_int8_pv_fp16_cuda": sage,
    "sageattn_qk_int8_pv_fp16_triton": sage,
    "sageattn_varlen": sage_varlen,
    "xops": XFormers,
    "_wrapped_flash_attn_3": attention_dispatch._wrapped_flash_attn_3._init_fn,  # the operator is for CUDA only
}
HUB = {
    "flash_hub": flash_2,
    "flash_varlen_hub": flash_2_varlen,
    "_flash_3_hub": flash_3,
    "_flash_3_varlen_hub": flash_3_varlen_early,
    "flash_4_hub": flash_4,
    "aiter_fa2_hub": aiter,
    "sage_hub": sage,
    "sage_blackwell_hub": sage_blackwell,
}


def install(patch: pytest.MonkeyPatch) -> None:
    """Puts the functions in the places from which diffusers' dispatcher calls the packages."""
    for name, function in FUNCTIONS.items():
        patch.setattr(attention_dispatch, name, function, raising=False)
    names = {member.value for member in _HUB_KERNELS_REGISTRY}  # earlier versions have fewer
    for name, function in HUB.items():
        if name not in names:
            continue
        patch.setattr(_HUB_KERNELS_REGISTRY[AttentionBackendName(name)], "kernel_fn", function)
