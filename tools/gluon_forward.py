"""An experiment: FlashAttention-3's forward loop in Gluon, head dim 128, Hopper: python -m tools.gluon_forward

One producer warp issues bulk copies; two warp groups of 64 query rows each multiply and exponentiate. With ``OVERLAP``
a group starts the scores of the next tile before it waits for the softmax of this one (Shah et al., arXiv 2407.08608,
section 3.2). Without a GPU the script compiles the kernel and prints what docs/hopper.md quotes; on a Hopper GPU it
also compares the output with PyTorch's and times both. No maps, no tails: lengths are multiples of 128.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tools.compile_report import TARGETS, summary

HEAD_DIM = 128
ROWS = 64  # of a consumer
LAYOUT = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], gl.bfloat16)
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # renamed in triton 3.9


@gluon.jit
def _fetch(d_tensor, o_row, p_ready, s_tile):
    mbarrier.expect(p_ready, d_tensor.block_type.nbytes)
    copy_tile(d_tensor, [o_row, 0], p_ready, s_tile)


@gluon.jit
def _produce(
    d_k, d_v, s_k, s_v, ready_k, ready_v, free_k, free_v, first, tiles, BN: gl.constexpr, STAGES: gl.constexpr
):
    for i in range(tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(free_k.index(stage), phase ^ 1)
        _fetch(d_k, first + i * BN, ready_k.index(stage), s_k.index(stage))
        mbarrier.wait(free_v.index(stage), phase ^ 1)
        _fetch(d_v, first + i * BN, ready_v.index(stage), s_v.index(stage))


@gluon.jit
def _softmax(b_s, b_max, b_sum, scale_log2, OUT: gl.constexpr):
    b_new_max = gl.maximum(b_max, gl.max(b_s, 1) * scale_log2)
    b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_new_max, 1))
    b_decay = gl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_decay + gl.sum(b_p, 1)
    b_p = gl.convert_layout(b_p.to(gl.bfloat16), gl.DotOperandLayout(0, OUT, 2))
    return b_p, gl.convert_layout(b_decay, gl.SliceLayout(1, OUT)), b_new_max, b_sum


@gluon.jit
def _consume(
    s_q, ready_q, s_k, s_v, ready_k, ready_v, free_k, free_v, p_out, p_lse, row, tiles, scale_log2,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    b_acc = gl.zeros([BM, D], gl.float32, OUT)
    b_zero = gl.zeros([BM, BN], gl.float32, SCORES)
    b_max = gl.full([BM], -3.0e38, gl.float32, gl.SliceLayout(1, SCORES))
    b_sum = gl.zeros([BM], gl.float32, gl.SliceLayout(1, SCORES))
    mbarrier.wait(ready_q, 0)
    if OVERLAP:
        mbarrier.wait(ready_k.index(0), 0)
        b_s = warpgroup_mma(s_q, s_k.index(0).permute((1, 0)), b_zero, use_acc=False)
        mbarrier.arrive(free_k.index(0))
        b_p, b_decay, b_max, b_sum = _softmax(b_s, b_max, b_sum, scale_log2, OUT)
        for i in range(1, tiles):
            k, v = i % STAGES, (i - 1) % STAGES
            mbarrier.wait(ready_k.index(k), (i // STAGES) & 1)
            scores = warpgroup_mma(s_q, s_k.index(k).permute((1, 0)), b_zero, use_acc=False, is_async=True)
            mbarrier.wait(ready_v.index(v), ((i - 1) // STAGES) & 1)
            values = warpgroup_mma(b_p, s_v.index(v), b_acc, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(free_k.index(k))
            b_next, b_decay, b_max, b_sum = _softmax(b_s, b_max, b_sum, scale_log2, OUT)
            b_acc = warpgroup_mma_wait(0, deps=[values])
            mbarrier.arrive(free_v.index(v))
            b_acc = b_acc * gl.expand_dims(b_decay, 1)
            b_p = b_next
        v = (tiles - 1) % STAGES
        mbarrier.wait(ready_v.index(v), ((tiles - 1) // STAGES) & 1)
        b_acc = warpgroup_mma(b_p, s_v.index(v), b_acc)
    else:
        for i in range(tiles):
            stage = i % STAGES
            phase = (i // STAGES) & 1
            mbarrier.wait(ready_k.index(stage), phase)
            b_s = warpgroup_mma(s_q, s_k.index(stage).permute((1, 0)), b_zero, use_acc=False)
            mbarrier.arrive(free_k.index(stage))
            b_p, b_decay, b_max, b_sum = _softmax(b_s, b_max, b_sum, scale_log2, OUT)
            b_acc = b_acc * gl.expand_dims(b_decay, 1)
            mbarrier.wait(ready_v.index(stage), phase)
            b_acc = warpgroup_mma(b_p, s_v.index(stage), b_acc)
            mbarrier.arrive(free_v.index(stage))
    gl.store(p_lse + row + gl.arange(0, BM, gl.SliceLayout(1, SCORES)), (b_max + gl.log2(b_sum)) * 0.6931471805599453)
    b_acc = b_acc / gl.expand_dims(gl.convert_layout(b_sum, gl.SliceLayout(1, OUT)), 1)
    o_row = (row + gl.arange(0, BM, gl.SliceLayout(1, OUT))).to(gl.int64)
    o_d = gl.arange(0, D, gl.SliceLayout(0, OUT))
    gl.store(p_out + gl.expand_dims(o_row, 1) * D + gl.expand_dims(o_d, 0), b_acc.to(gl.bfloat16))


@gluon.jit
def forward_kernel(
    d_q, d_k, d_v, p_out, p_lse, queries, keys, scale_log2,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    head = gl.program_id(1)
    row = head * queries + gl.program_id(0) * 2 * BM
    s_q = gl.allocate_shared_memory(gl.bfloat16, [2, BM, D], d_q.layout)
    s_k = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], d_k.layout)
    s_v = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], d_v.layout)
    ready_q = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(ready_v.index(i), count=1)
        mbarrier.init(free_k.index(i), count=2)
        mbarrier.init(free_v.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ready_q.index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(2):
        _fetch(d_q, row + i * BM, ready_q.index(i), s_q.index(i))
    tiles = keys // BN
    gl.warp_specialize(  # the tuples must stand here: a variable would turn constants into values
        [
            (_consume, (
                s_q.index(0), ready_q.index(0), s_k, s_v, ready_k, ready_v, free_k, free_v,
                p_out, p_lse, row, tiles, scale_log2, BM, BN, D, STAGES, OVERLAP,
            )),
            (_consume, (
                s_q.index(1), ready_q.index(1), s_k, s_v, ready_k, ready_v, free_k, free_v,
                p_out, p_lse, row + BM, tiles, scale_log2, BM, BN, D, STAGES, OVERLAP,
            )),
            (_produce, (d_k, d_v, s_k, s_v, ready_k, ready_v, free_k, free_v, head * keys, tiles, BN, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def compile_for_hopper(**constants: int) -> object:
    tile = "tensordesc<bf16[{}, {}],{!r}>"
    signature = {"d_q": tile.format(ROWS, HEAD_DIM, LAYOUT), "p_out": "*bf16", "p_lse": "*fp32", "scale_log2": "fp32"}
    signature |= dict.fromkeys(("d_k", "d_v"), tile.format(constants["BN"], HEAD_DIM, LAYOUT))
    signature |= dict.fromkeys(("queries", "keys"), "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in forward_kernel.arg_names}
    source = GluonASTSource(forward_kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in (3, 4)})
    return triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": 4})


def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **constants: int) -> torch.Tensor:
    """Attention of contiguous bfloat16 [B, H, S, 128]."""
    batch, heads, queries, _ = query.shape
    keys, out = key.shape[2], torch.empty_like(query)
    lse = torch.empty(query.shape[:3], device=query.device)
    sizes = (ROWS, constants["BN"], constants["BN"])
    tensors = (t.view(-1, HEAD_DIM) for t in (query, key, value))
    descriptors = [TensorDescriptor.from_tensor(t, [n, HEAD_DIM], LAYOUT) for t, n in zip(tensors, sizes, strict=True)]
    scale_log2 = HEAD_DIM**-0.5 * 1.4426950408889634
    forward_kernel[queries // (2 * ROWS), batch * heads](
        *descriptors, out, lse, queries, keys, scale_log2, **constants, num_warps=4
    )
    return out


def main() -> None:
    print(f"triton {triton.__version__}")
    for bn, stages, overlap in ((128, 2, 0), (128, 2, 1), (64, 3, 1)):
        constants = {"BM": ROWS, "BN": bn, "D": HEAD_DIM, "STAGES": stages, "OVERLAP": overlap}
        print(f"128x{bn} stages {stages} overlap {overlap}: {summary(compile_for_hopper(**constants))}", flush=True)
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
            q, k, v = (torch.randn(1, 24, 4608, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            sdpa = torch.nn.functional.scaled_dot_product_attention
            torch.testing.assert_close(run(q, k, v, **constants), sdpa(q, k, v), rtol=2e-2, atol=2e-3)
            ours, theirs = (
                triton.testing.do_bench(call, return_mode="median")
                for call in (lambda: run(q, k, v, **constants), lambda: sdpa(q, k, v))  # noqa: B023
            )
            print(f"  agrees with PyTorch; {ours:.3f} ms, PyTorch {theirs:.3f} ms")


if __name__ == "__main__":
    main()
