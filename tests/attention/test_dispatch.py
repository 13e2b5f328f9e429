"""Which backend "auto" selects, why others cannot run, and the shapes that the operators promise."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from star_kernels import TokenSelection, attention
from star_kernels.attention import direct, dispatch, ops
from star_kernels.attention.dispatch import choose_backend, obstacle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_selects_the_fused_kernels_of_the_device(dtype):
    assert choose_backend("cpu", dtype, 64) == "vendor"
    pytest.importorskip("triton")
    assert choose_backend("cuda", dtype, 128) == "auto"  # the operator's choice depends on the lengths


def test_a_compiled_call_may_name_its_backend():
    def f(x):
        return x + 1 if obstacle("triton", "cuda", torch.float32, x.shape[-1]) is None else x

    dispatch.triton_problem.cache_clear()
    torch.compile(f, fullgraph=True, backend="eager")(torch.ones(16))


def test_float64_runs_the_reference():
    assert choose_backend("cpu", torch.float64, 64) == choose_backend("cuda", torch.float64, 64) == "naive"


def test_a_gpu_without_triton_runs_pytorchs_kernels(monkeypatch, recwarn):
    monkeypatch.setattr(dispatch, "triton_problem", lambda: "the package triton is missing")
    assert choose_backend("cuda", torch.bfloat16, 64) == "auto"
    assert not recwarn.list
    assert choose_backend("cuda", torch.bfloat16, 64, masked=True) == "naive"  # not supported by PyTorch's kernels
    assert "a key_mask" in str(recwarn.pop().message)


def test_a_mask_on_heads_too_wide_for_triton_runs_the_reference(recwarn):
    assert choose_backend("cuda", torch.bfloat16, 2 * dispatch.TRITON_HEAD_DIM, masked=True) == "naive"
    assert choose_backend("cuda", torch.bfloat16, 2 * dispatch.TRITON_HEAD_DIM) == "auto"


@pytest.mark.parametrize("masked", [True, False])
def test_the_choice_of_the_backend_depends_on_the_mask(masked, monkeypatch):
    asked = []
    monkeypatch.setattr(direct, "attention", lambda *arguments: None)
    monkeypatch.setattr(dispatch, "choose_backend", lambda *arguments: asked.append(arguments) or "naive")
    query, mask = torch.randn(1, 1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    attention(query, query, query, TokenSelection.from_positions([[1]]), key_mask=mask if masked else None)
    assert asked == [("cpu", torch.float32, 16, masked)]


def test_a_gpu_that_falls_back_to_the_reference_warns_once(monkeypatch, recwarn):
    monkeypatch.setattr(dispatch, "triton_problem", lambda: "the package triton is missing")
    assert choose_backend("cuda", torch.bfloat16, 61) == "naive"
    assert choose_backend("cuda", torch.bfloat16, 61) == "naive"
    messages = [str(w.message) for w in recwarn]
    assert len(messages) == 1
    assert "triton is missing" in messages[0]


@pytest.mark.parametrize(
    ("backend", "device", "head_dim", "reason"),
    [
        ("triton", "cpu", 64, "CUDA"),
        ("flash", "cpu", 64, "CUDA"),
        ("triton", "cuda", 1000, f"{dispatch.TRITON_HEAD_DIM}"),
        ("cudnn", "cuda", 256, "128"),
        ("flash", "cuda", 61, "multiple of 8"),
    ],
)
def test_an_obstacle_names_its_reason(backend, device, head_dim, reason):
    pytest.importorskip("triton")
    assert reason in obstacle(backend, device, torch.bfloat16, head_dim)


@pytest.mark.parametrize("backend", ["vendor", "cudnn", "flash", "efficient"])
def test_a_key_mask_on_a_gpu_is_an_obstacle_of_pytorchs_kernels(backend):
    pytest.importorskip("triton")
    assert obstacle(backend, "cuda", torch.bfloat16, 64) is None
    assert "key_mask" in obstacle(backend, "cuda", torch.bfloat16, 64, masked=True)
    assert obstacle("vendor", "cpu", torch.float32, 64, masked=True) is None


def test_auto_has_no_obstacle_if_one_kernel_supports_the_head_dimension():
    pytest.importorskip("triton")
    assert obstacle("auto", "cuda", torch.bfloat16, 512) is None  # efficient
    assert obstacle("auto", "cuda", torch.bfloat16, 513) is not None


def test_an_explicit_backend_that_cannot_run_is_an_error():
    query = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run here.*CUDA"):
        attention(query, query, query, TokenSelection.from_positions([[1]]), backend="triton")


@pytest.mark.parametrize("reduce_heads", [True, False])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_shapes_and_layout_of_the_triton_operator_are_known_without_a_gpu(layout, reduce_heads):
    with FakeTensorMode():
        shape = (2, 3, 130, 64) if layout == "bhsd" else (2, 130, 3, 64)
        query = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        query = query if layout == "bhsd" else query.transpose(1, 2)
        index = torch.empty(2, 5, dtype=torch.int32, device="cuda")
        weight = torch.empty(2, 2, 5, device="cuda")
        arguments = (query, query, query, index, weight, None, 10, 100, 0.125, reduce_heads, "triton")
        out, maps, lse = ops.ATTENTION(*arguments)
        assert out.shape == query.shape
        assert out.stride() == query.stride()
        assert maps.shape == ((2, 2, 100) if reduce_heads else (2, 2, 3, 100))
        assert maps.dtype == lse.dtype == torch.float32
        assert lse.shape == (2, 3, 130)
        assert maps.device.type == lse.device.type == "cuda"
