"""PyTorch's fused CUDA attention behind one interface, tested without a GPU.

Shapes come from PyTorch's own fake tensors, numbers from substitutes that follow each operator's conventions.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star_kernels.attention import dispatch, layouts, naive, ops, vendor
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.tuning import Plan

SHAPE = (2, 3, 50, 16)


def tensors(device: str = "cpu", layout: str = "bhsd", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, heads, length, width = SHAPE
    shape = SHAPE if layout == "bhsd" else (batch, length, heads, width)
    found = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]
    return found if layout == "bhsd" else [t.transpose(1, 2) for t in found]


@pytest.mark.parametrize("kernel", vendor.KERNELS)
def test_every_operator_has_the_signature_that_it_is_called_with(kernel: str) -> None:
    vendor._operator(f"{kernel}_attention")
    vendor._operator(f"{kernel}_attention_backward")


def test_an_operator_with_another_signature_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vendor._ARGUMENTS, "_scaled_dot_product_flash_attention", "query key")
    vendor._operator.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"_scaled_dot_product_flash_attention .* must take the arguments query key, got"
    ):
        vendor._operator("flash_attention")


@pytest.mark.parametrize("kernel", vendor.KERNELS)
def test_every_kernel_gives_an_output_and_a_log_sum_exp_for_each_row(kernel: str) -> None:
    with FakeTensorMode():
        out, lse = vendor.cuda_forward(kernel, *tensors("cuda", dtype=torch.bfloat16), 0.25)
    assert (out.shape, out.dtype) == (SHAPE, torch.bfloat16)
    assert (lse.shape, lse.dtype) == (SHAPE[:3], torch.float32)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sliced"])
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])  # efficient copies its output, which fake tensors cannot do here
def test_shapes_and_layouts_are_those_that_the_operator_promises(
    kernel: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's fake kernels in the operator's implementation, against the operator's own fake implementation."""
    monkeypatch.setattr(ops, "maps_of", lambda query, key, lse, arguments: ops._empty_maps(query, arguments))
    monkeypatch.setattr(layouts, "is_aligned", lambda tensor: tensor.stride(-1) == 1)  # a fake tensor has no address
    monkeypatch.setattr(vendor, "_no_dropout", fresh_state)
    with FakeTensorMode():
        query, key, value = tensors("cuda", "bhsd" if layout == "sliced" else layout, torch.bfloat16)
        if layout == "sliced":
            query = torch.empty(2, 3, 100, 32, device="cuda", dtype=torch.bfloat16).narrow(2, 25, 50).narrow(3, 0, 16)
        index = torch.empty(2, 5, dtype=torch.int32, device="cuda")
        weight = torch.empty(2, 2, 5, device="cuda")
        arguments = (index, weight, None, 0, 40, 0.25, True, kernel)
        real, promised = (f(query, key, value, *arguments) for f in (ops.attention, ops.attention_fake))
        for got, expected in zip(real, promised, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)
        out, _, lse = real
        grads = (torch.empty_like(out), None, None)
        real, promised = (
            f(*grads, query, key, value, out, lse, *arguments)
            for f in (ops.attention_backward, ops.attention_backward_fake)
        )
        for got, expected in zip(real, promised, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (expected.shape, expected.stride(), expected.dtype)


fresh_state = vendor._no_dropout.__wrapped__  # not cached: it is fake here


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    assert scale > 0  # the kernels take row maxima before scaling
    scores = query @ key.transpose(-1, -2) * scale
    return torch.softmax(scores, dim=-1) @ value, torch.logsumexp(scores, dim=-1)


def gradients(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the log-sum-exp, as in the kernels."""
    probability = torch.exp(query @ key.transpose(-1, -2) * scale - lse[..., None])
    delta = (grad_out * out).sum(dim=-1, keepdim=True)
    grad_scores = probability * (grad_out @ value.transpose(-1, -2) - delta) * scale
    return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, probability.transpose(-1, -2) @ grad_out


class Substitute:
    """The six operators with their conventions: shapes of the log-sum-exp, order of arguments, layout of results."""

    def __call__(self, name: str) -> Any:
        return getattr(self, name)

    def flash_attention(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, debug: bool, *, scale: float
    ):
        assert (dropout, causal, debug) == (0.0, False, False)
        return (*attention(q, k, v, scale), None, None, q.shape[2], k.shape[2], None, None, None)

    def cudnn_attention(self, q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
        assert (bias, with_lse, dropout, causal, debug) == (None, True, 0.0, False, False)
        out, lse = attention(q, k, v, scale)
        return (out, lse[..., None], None, None, q.shape[2], k.shape[2], None, None, None)

    def efficient_attention(self, q, k, v, bias, with_lse, dropout, causal, *, scale):
        assert (bias, with_lse, dropout, causal) == (None, True, 0.0, False)
        out, lse = attention(q, k, v, scale)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf), None, None

    def flash_attention_backward(
        self, grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale
    ):
        assert (cum_q, cum_k, max_q, max_k, dropout, causal) == (None, None, q.shape[2], k.shape[2], 0.0, False)
        assert lse.shape == q.shape[:3]
        assert seed.dtype == offset.dtype == torch.uint64
        return gradients(grad, q, k, v, out, lse, scale)

    def cudnn_attention_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert (bias, cum_q, cum_k, max_q, max_k) == (None, None, None, q.shape[2], k.shape[2])
        assert (dropout, causal) == (0.0, False)
        assert lse.shape == (*q.shape[:3], 1)
        assert seed.dtype == offset.dtype == torch.int64
        return gradients(grad, q, k, v, out, lse[..., 0], scale)

    def efficient_attention_backward(
        self, grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale
    ):
        assert (bias, dropout, wanted, causal) == (None, 0.0, [True, True, True, False], False)
        assert lse.shape[2] % 32 == 0
        assert out.transpose(1, 2).is_contiguous()  # kernel_backward.h: o_strideM() is head_dim_value * num_heads
        assert all(stride % 4 == 0 for stride in (*q.stride()[:-1], *k.stride()[:-1], *v.stride()[:-1]))
        assert seed.dtype == offset.dtype == torch.int64
        assert bool((lse[..., q.shape[2] :] == math.inf).all())
        return (*gradients(grad, q, k, v, out, lse[..., : q.shape[2]], scale), None)


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("kernel", vendor.KERNELS)
def test_every_kernel_gives_output_log_sum_exp_and_gradients(
    kernel: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vendor, "_operator", Substitute())
    leaves = [t.double().requires_grad_() for t in tensors()]
    upstream = torch.randn(SHAPE, dtype=torch.float64)
    scores = leaves[0] @ leaves[1].transpose(-1, -2) * scale
    expected_out, expected_lse = torch.softmax(scores, dim=-1) @ leaves[2], torch.logsumexp(scores, dim=-1)
    expected = torch.autograd.grad(expected_out, leaves, upstream)
    detached = [t.detach() for t in leaves]
    out, lse = vendor.cuda_forward(kernel, *detached, scale)
    torch.testing.assert_close(out, expected_out.detach())
    torch.testing.assert_close(lse, expected_lse.detach())
    for other in vendor.KERNELS:  # any backward pass goes with any forward pass
        got = vendor.cuda_backward(other, upstream, *detached, out, lse, scale)
        for part, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(part, wanted)


@pytest.mark.parametrize("wanted", ["out", "lse", "out and lse"])
def test_the_efficient_kernel_computes_the_gradient_of_the_log_sum_exp_in_float32(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vendor, "_operator", Substitute())
    leaves = [t.requires_grad_() for t in tensors()]
    scores = leaves[0] @ leaves[1].transpose(-1, -2) * 0.3
    out, lse = torch.softmax(scores, dim=-1) @ leaves[2], torch.logsumexp(scores, dim=-1)
    upstream = [torch.randn_like(t) if name in wanted else None for name, t in (("out", out), ("lse", lse))]
    loss = sum((t * g).sum() for t, g in ((out, upstream[0]), (lse, upstream[1])) if g is not None)
    expected = torch.autograd.grad(loss, leaves, materialize_grads=True)
    detached = [t.detach() for t in (*leaves, out, lse)]
    got = vendor.cuda_float32_backward(*upstream, *detached, 0.3)
    for part, wanted_part in zip(got, expected, strict=True):
        assert part.shape == wanted_part.shape
        torch.testing.assert_close(part, wanted_part)


@pytest.mark.parametrize(("version", "good"), [(None, True), (91002, False), (91500, False), (91501, True)])
def test_a_cudnn_with_wrong_results_is_not_used(
    version: int | None, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(dispatch, "cudnn_problem", dispatch.cudnn_problem.__wrapped__)
    assert (dispatch.kernel_obstacle("cudnn", torch.bfloat16, 64) is None) == good
    assert dispatch.kernel_obstacle("flash", torch.bfloat16, 64) is None
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert dispatch.kernel_obstacle("cudnn", torch.bfloat16, 64) is not None


@pytest.mark.parametrize(
    ("kernel", "dtype", "head_dim", "reason"),
    [
        ("flash", torch.float32, 64, "float16 or bfloat16"),
        ("cudnn", torch.float32, 64, "float16 or bfloat16"),
        ("flash", torch.bfloat16, 264, "256"),
        ("cudnn", torch.bfloat16, 136, "128"),
        ("efficient", torch.float32, 30, "multiple of 4"),
        ("efficient", torch.float16, 36, "multiple of 8"),
    ],
)
def test_an_obstacle_of_a_kernel_names_its_limit(kernel: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert reason in dispatch.kernel_obstacle(kernel, dtype, head_dim)
    assert dispatch.kernel_obstacle("efficient", torch.float32, 64) is None


def test_rows_that_are_not_aligned_to_16_bytes_are_copied() -> None:
    whole = torch.randn(2, 3, 50, 24)
    odd = whole[..., 1:17]
    assert not layouts.is_aligned(odd)
    (copied,) = layouts.aligned(odd)
    assert layouts.is_aligned(copied)
    assert torch.equal(copied, odd)
    assert layouts.aligned(whole)[0] is whole
    shifted = torch.randn(whole.numel() + 1)[1:].view(whole.shape)  # contiguous, but not from 16 bytes on
    assert layouts.is_aligned(layouts.aligned(shifted)[0])
    repeated = torch.randn(1, 3, 50, 16).expand(2, -1, -1, -1)
    assert layouts.aligned(repeated)[0].is_contiguous()


def test_results_are_copied_into_the_promised_layout() -> None:
    like, result = tensors(layout="bshd")[0], torch.randn(SHAPE)
    moved = layouts.laid_out(result, like)
    assert moved.stride() == like.stride()
    assert torch.equal(moved, result)
    assert layouts.laid_out(moved, like) is moved


@pytest.mark.parametrize("wanted", ["maps", "lse", "nothing but the output"])
def test_pytorchs_kernels_compute_only_the_gradient_of_the_output(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_backward = pytest.importorskip("star_kernels.attention.triton_backward", reason="needs triton")
    taken = []
    monkeypatch.setattr(dispatch, "plan_of_call", lambda *arguments: Plan("flash", "flash"))
    monkeypatch.setattr(layouts, "is_aligned", lambda tensor: True)
    monkeypatch.setattr(vendor, "cuda_backward", lambda kernel, grad, q, k, v, *rest: taken.append(kernel) or (q, k, v))
    monkeypatch.setattr(
        triton_backward, "attention_backward", lambda *a, **k: taken.append("triton") or (a[3], a[4], a[5])
    )
    with FakeTensorMode():
        query, key, value = tensors("cuda", dtype=torch.bfloat16)
        lse, maps = torch.empty(SHAPE[:3], device="cuda"), torch.empty(2, 1, 50, device="cuda")
        index, weight = torch.empty(2, 3, dtype=torch.int32, device="cuda"), torch.empty(2, 1, 3, device="cuda")
        ops.attention_backward(
            torch.empty_like(query), maps if wanted == "maps" else None, lse if wanted == "lse" else None,
            query, key, value, query, lse, index, weight, None, 0, 50, 0.25, True, "auto",
        )  # fmt: skip
    assert taken == (["flash"] if wanted == "nothing but the output" else ["triton"])


class OnGpu(Tensor):
    """A CPU tensor with ``is_cuda``, so that the operators take the path for a GPU."""

    is_cuda = True


@pytest.mark.parametrize("wanted", ["out", "maps", "lse", "out maps lse"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("kernel", vendor.KERNELS)
def test_without_triton_pytorchs_kernels_give_maps_and_all_gradients(
    kernel: str, layout: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators' CUDA path with substitutes for PyTorch's kernels."""
    monkeypatch.setattr(dispatch, "triton_problem", lambda: "the package triton is not installed")
    monkeypatch.setattr(vendor, "_operator", Substitute())
    leaves = [t.requires_grad_() for t in tensors(layout=layout)]
    index, weight = torch.tensor([[1, 49, -1], [7, 7, 0]], dtype=torch.int32), torch.rand(2, 2, 3)
    rest = (3, 40, -0.3, True)
    reference = naive.attention(*leaves, MapArguments(index, weight, None, *rest))
    expected = dict(zip(("out", "maps", "lse"), reference, strict=True))
    upstream = {name: torch.randn_like(t) if name in wanted else None for name, t in expected.items()}
    loss = sum((t * upstream[name]).sum() for name, t in expected.items() if upstream[name] is not None)
    expected_grads = torch.autograd.grad(loss, leaves, materialize_grads=True)

    inputs = [t.detach().as_subclass(OnGpu) for t in leaves]
    got = dict(zip(("out", "maps", "lse"), ops.attention(*inputs, index, weight, None, *rest, kernel), strict=True))
    for name, result in got.items():
        torch.testing.assert_close(result.as_subclass(Tensor), expected[name].detach())
    assert got["out"].stride() == leaves[0].stride()
    grads = ops.attention_backward(
        *upstream.values(), *inputs, got["out"], got["lse"], index, weight, None, *rest, kernel
    )
    for grad, wanted_grad, leaf in zip(grads, expected_grads, leaves, strict=True):
        torch.testing.assert_close(grad.as_subclass(Tensor), wanted_grad)
        assert grad.stride() == leaf.stride()


def test_cudnn_requires_two_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        query, key = (torch.empty(1, 2, n, 64, dtype=torch.bfloat16, device="cuda") for n in (5, 1))
        index, weight = torch.empty(1, 1, dtype=torch.int32, device="cuda"), torch.empty(1, 1, 1, device="cuda")
        with pytest.raises(ValueError, match=r"'cudnn' cannot run here: .* two keys"):
            ops.attention(query, key, key, index, weight, None, 0, 5, 0.25, True, "cudnn")
        monkeypatch.setattr(dispatch, "plan", lambda *arguments: Plan("cudnn", "cudnn"))
        assert dispatch.plan_of_call("auto", query, key, None) == Plan("efficient", "efficient")
        assert dispatch.plan_of_call("auto", query, query, None) == Plan("cudnn", "cudnn")


def test_deterministic_algorithms_select_the_backward_pass_that_repeats_bit_for_bit() -> None:
    pytest.importorskip("triton")
    query = torch.empty(1, 1, 4, 64)
    assert dispatch.plan_of_call("flash", query, query, None) == Plan("flash", "flash")
    torch.use_deterministic_algorithms(True)
    try:
        assert dispatch.plan_of_call("flash", query, query, None) == Plan("flash", "triton")
        wide = torch.empty(1, 1, 4, 2 * dispatch.TRITON_HEAD_DIM)  # too wide for Triton
        assert dispatch.plan_of_call("flash", wide, wide, None) == Plan("flash", "flash")
    finally:
        torch.use_deterministic_algorithms(False)
