"""The attention kernel for Hopper: its launch, and what prevents it. See docs/hopper.md and csrc/cuda/attention.cuh."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from star_kernels import native
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.layouts import aligned, result_like

HEAD_DIMS = (64, 128)
CAPABILITY = (9, 0)
ARCHITECTURE = "sm_90a"


class Variant(NamedTuple):
    """A shape of the kernel; the zeros of the default are those of the head dimension."""

    consumers: int = 0  # groups of four warps that compute, each with 64 rows
    keys: int = 0  # of a tile
    stages: int = 0  # tiles of keys, and of values, in shared memory
    overlap: int = 0  # 1: the scores of the next keys start before the softmax of the last ones


DEFAULT = Variant()
DEFAULTS = {64: Variant(2, 176, 2, 1), 128: Variant(2, 128, 2, 1)}  # of attention_forward.cu
VARIANTS = {  # of attention_variants.cu, of bfloat16 alone
    64: ((2, 176, 2, 0), (2, 176, 4, 1), (2, 128, 4, 1), (3, 112, 2, 1), (3, 96, 4, 1)),
    128: ((2, 128, 2, 0), (2, 160, 2, 1), (2, 176, 2, 1)),
}


def obstacle(dtype: torch.dtype, head_dim: int, capability: tuple[int, int] | None) -> str | None:
    """What prevents the kernel from running on these inputs, or None.

    Args:
        capability: of the device; None if there is no GPU.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return "float16 or bfloat16 is required"
    if head_dim not in HEAD_DIMS:
        return "the head dimension must be 64 or 128"
    if capability != CAPABILITY:
        found = "there is no GPU" if capability is None else "this GPU has {}.{}".format(*capability)
        return f"a Hopper GPU, of compute capability 9.0, is required, and {found}"
    return _library_problem()


def _library_problem() -> str | None:
    library = native.cuda()
    if library is None:
        return native.problem("cuda")
    compiled = str(library.architectures())
    return None if ARCHITECTURE in compiled.split() else f"the CUDA library is compiled for {compiled} only"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: MapArguments,
    *,
    with_maps: bool = True,
    variant: Variant = DEFAULT,
    status: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Softmax attention, its maps and its log-sum-exp. The mean of the maps over heads is a second launch.

    Args:
        query: ``[B, H, Sq, D]``, float16 or bfloat16, any strides.
        key, value: ``[B, H, Sk, D]``, any strides.
        arguments: of the maps, and the key mask and scale of the attention.
        with_maps: if False, the same kernel without maps, to measure their cost.
        variant: the shape of the kernel.
        status: address of int32 ``[blocks, warps, 4]``, zeros in memory that host and device share. A wait that does
            not end leaves its barrier + 1, parity, tile and step there, and then ends the kernel with an error.

    Returns:
        The output in the layout of ``query``; maps, float32 ``[B, G, R]``, or ``[B, G, H, R]`` per head, or None; the
        natural log-sum-exp, float32 ``[B, H, Sq]``. For a row without any key they are 0, 0 and -inf.
    """
    index, weight, key_mask, start, n_rows, scale, reduce_heads = arguments.of_attention
    if scale < 0:  # the kernel takes row maxima before scaling
        query, scale = -query, -scale
    out = result_like(query)
    query, key, value = aligned(query, key, value)
    batch, heads, queries, _ = query.shape
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=query.device)
    maps = None
    if with_maps:
        maps = torch.empty((batch, weight.shape[1], heads, n_rows), dtype=torch.float32, device=query.device)
        index, weight = index.contiguous(), weight.contiguous()
    if key_mask is not None:
        key_mask = key_mask.contiguous()
    library: Any = native.cuda()
    library.attention_forward(
        query, key, value, index, weight, key_mask, out, lse, maps, start, max(scale, 1e-30), *variant, status
    )
    if maps is not None and reduce_heads:
        from star_kernels.attention.triton_config import overlaps_launches
        from star_kernels.attention.triton_maps import mean_over_heads

        maps = mean_over_heads(maps, overlaps_launches(query.device))
    return out, maps, lse
