"""The kernel for Hopper: what prevents it, what its launch passes on, and, on such a GPU, its numeric contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import CASES, IDS, VIEWS, gradients, make, run, textbook_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star_kernels import TokenSelection, attention, native
from star_kernels.attention import dispatch, hopper, naive, ops, tuning
from star_kernels.attention.arguments import MapArguments
from star_kernels.attention.tuning import Plan

DTYPES = [torch.float16, torch.bfloat16]


class Library:
    """A library whose kernel is the reference, and that keeps the arguments of its launches."""

    def __init__(self, architectures: str = "sm_80 sm_90a") -> None:
        self.launches: list[tuple[Any, ...]] = []
        self._architectures = architectures

    def architectures(self) -> str:
        return self._architectures

    def attention_forward(self, *arguments: Any) -> None:
        self.launches.append(arguments)
        query, key, value, index, weight, key_mask, out, lse, maps, start, scale = arguments[:11]
        rows = query.shape[2] if maps is None else maps.shape[3]
        found = naive.attention(
            query, key, value, MapArguments(index, weight, key_mask, start, rows, scale, reduce_heads=False)
        )
        out.copy_(found[0])
        lse.copy_(found[2])
        if maps is not None:
            maps.copy_(found[1])


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(native, "cuda", lambda: found)
    return found


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "reason"),
    [
        (torch.float32, 64, (9, 0), "float16 or bfloat16"),
        (torch.bfloat16, 96, (9, 0), "64 or 128"),
        (torch.bfloat16, 64, (8, 0), "this GPU has 8.0"),
        (torch.bfloat16, 64, (10, 0), "this GPU has 10.0"),
        (torch.float16, 128, None, "there is no GPU"),
    ],
)
def test_an_obstacle_names_its_reason(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int] | None, reason: str, library: Library
) -> None:
    assert reason in str(hopper.obstacle(dtype, head_dim, capability))
    assert hopper.obstacle(torch.bfloat16, 64, hopper.CAPABILITY) is None


def test_a_library_without_hoppers_instructions_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda", lambda: Library("sm_80 sm_90"))
    assert "compiled for sm_80 sm_90 only" in str(hopper.obstacle(torch.bfloat16, 64, (9, 0)))
    monkeypatch.setattr(native, "cuda", lambda: None)
    monkeypatch.setattr(native, "problem", lambda device: f"no library for {device}")
    assert hopper.obstacle(torch.bfloat16, 64, (9, 0)) == "no library for cuda"


def test_a_call_by_name_that_cannot_run_is_an_error() -> None:
    query = torch.randn(1, 1, 4, 64, dtype=torch.bfloat16)
    selection = TokenSelection.from_positions([[1]])
    with pytest.raises(ValueError, match=r"backend 'hopper' cannot run here.*CUDA"):
        attention(query, query, query, selection, backend="hopper")


def test_the_backend_takes_a_key_mask_and_auto_does_not_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "hopper_problem", lambda dtype, head_dim: None)
    assert dispatch.obstacle("hopper", "cuda", torch.bfloat16, 64, masked=True) is None
    for head_dim in hopper.HEAD_DIMS:
        assert dispatch.default_plan(torch.bfloat16, head_dim, (9, 0)).forward != "hopper"


def test_the_backward_pass_is_that_of_the_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "plan", lambda *arguments: Plan("triton", "cudnn"))
    query, one = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 1, 64)
    assert dispatch.plan_of_call("hopper", query, query, None) == Plan("hopper", "cudnn")
    assert dispatch.plan_of_call("hopper", query, one, None) == Plan("hopper", "efficient")
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert dispatch.plan_of_call("hopper", query, query, mask) == Plan("hopper", "triton")


def test_a_table_may_name_the_kernel() -> None:
    entry = {"dtype": "bfloat16", "head_dim": 128, "size_class": 12, "forward": "hopper", "backward": "cudnn"}
    entries = ({**entry, "flash": "FA2"},)
    found = tuning.find(entries, torch.bfloat16, 128, 12, "FA2", lambda kernel: True)
    assert found == Plan("hopper", "cudnn", measured=True)
    assert tuning.find(entries, torch.bfloat16, 128, 12, "FA2", lambda kernel: kernel != "hopper") is None


@pytest.mark.parametrize("name", ["plain", "cross", "phrases_per_head", "mask_all", "scale_negative", "scale_zero"])
def test_the_launch_passes_on_what_the_kernel_needs(name: str, library: Library) -> None:
    x = make(CASES[name], torch.bfloat16)
    scale = x.query.shape[-1] ** -0.5 if x.options["scale"] is None else x.options["scale"]
    arguments = MapArguments(x.selection.index, x.selection.weight, x.key_mask, 0, x.query.shape[2], scale, False)
    got = hopper.attention(*x.tensors, arguments)
    for found, want in zip(got, naive.attention(*x.tensors, arguments), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-3)
    (launch,) = library.launches
    assert launch[10] > 0
    assert launch[11:] == (0, 0, 0, 0, 0)
    hopper.attention(*x.tensors, arguments, with_maps=False, variant=hopper.Variant(2, 176, 4, 1), status=64)
    assert library.launches[1][8] is None
    assert library.launches[1][11:] == (2, 176, 4, 1, 64)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_the_kernel_gets_rows_of_16_byte_units(view: Callable[[Tensor], Tensor], library: Library) -> None:
    query, key, value = (view(torch.randn(2, 3, 9, 64).bfloat16()) for _ in range(3))
    index, weight = torch.tensor([[1], [2]], dtype=torch.int32), torch.ones(2, 1, 1)
    arguments = MapArguments(index, weight, None, 0, 9, 0.125, False)
    out, _, _ = hopper.attention(query, key, value, arguments)
    for tensor in (*library.launches[0][:3], library.launches[0][6]):
        assert tensor.stride(3) == 1
        assert tensor.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 and stride > 0 for stride in tensor.stride()[:3])
    assert out.stride() == ops.attention_fake(query, key, value, *arguments.of_attention, "hopper")[0].stride()


def test_shapes_are_known_without_a_gpu() -> None:
    with FakeTensorMode():
        query = torch.empty(2, 130, 3, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        index, weight = torch.empty(2, 5, dtype=torch.int32, device="cuda"), torch.empty(2, 2, 5, device="cuda")
        out, maps, lse = ops.ATTENTION(query, query, query, index, weight, None, 10, 100, 0.125, False, "hopper")
        assert out.stride() == query.stride()
        assert maps.shape == (2, 2, 3, 100)
        assert maps.dtype == lse.dtype == torch.float32


@pytest.fixture
def device() -> str:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if problem := hopper.obstacle(torch.bfloat16, 64, capability):
        pytest.skip(problem)
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS[1:])
@pytest.mark.parametrize("name", CASES)
def test_results_are_as_exact_as_pytorch(
    name: str, dtype: torch.dtype, head_dim: int, device: str, assert_as_exact: Callable[..., None], poisoned: None
) -> None:
    case = replace(CASES[name], shape=(*CASES[name].shape[:4], head_dim))
    x = make(case, dtype, device)
    got = run(x, "hopper")
    pytorch, exact = (textbook_of(x, kind)(x.tensors) for kind in (dtype, torch.float64))
    no_keys = exact[2] == -torch.inf
    assert torch.equal(got[2] == -torch.inf, no_keys)
    assert_as_exact("out", got[0], pytorch[0], exact[0], dtype)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=2**-12, atol=1e-5)
    torch.testing.assert_close(got[2].double(), exact[2], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [("out",), ("out", "maps", "lse")], ids=["out", "all"])
@pytest.mark.parametrize("name", ["plain", "cross", "phrases", "mask_some", "scale_negative", "joint_1357"])
def test_gradients_are_as_exact_as_pytorch(
    name: str, wanted: tuple[str, ...], device: str, assert_as_exact: Callable[..., None]
) -> None:
    x = make(replace(CASES[name], shape=(*CASES[name].shape[:4], 64)), torch.bfloat16, device)
    got = gradients(lambda tensors: run(x, "hopper", tensors), x, torch.bfloat16, wanted)
    pytorch, exact = (gradients(textbook_of(x, kind), x, kind, wanted) for kind in (torch.bfloat16, torch.float64))
    for part, *grads in zip(("query", "key", "value"), got, pytorch, exact, strict=True):
        assert_as_exact(f"gradient of {part}", *grads, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_strided_inputs_give_the_same_results(view: Callable[[Tensor], Tensor], device: str) -> None:
    x = make(replace(CASES["plain"], shape=(2, 3, 63, 63, 128)), torch.bfloat16, device)
    viewed = tuple(view(t) for t in x.tensors)
    for got, want in zip(run(x, "hopper", viewed), run(x, "hopper", tuple(t.clone() for t in viewed)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_the_operator_passes_pytorchs_checks_and_is_compiled_whole(device: str) -> None:
    x = make(replace(CASES["phrases"], shape=(2, 3, 63, 63, 64)), torch.bfloat16, device)
    flat = (x.selection.index, x.selection.weight, None, 3, 40, 0.125, True, "hopper")
    torch.library.opcheck(ops.ATTENTION.overload, (*x.tensors, *flat), test_utils=("test_schema", "test_faketensor"))

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return attention(query, key, value, x.selection, backend="hopper")[:2]

    compiled = torch.compile(call, fullgraph=True)
    for got, want in zip(compiled(*x.tensors), call(*x.tensors), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_results_repeat_bit_for_bit_and_in_a_graph(device: str) -> None:
    x = make(replace(CASES["joint_1357"], shape=(2, 24, 1357, 1357, 64), positions=[[5], [7]]), torch.bfloat16, device)
    first = run(x, "hopper")
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(x, "hopper"), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x, "hopper")
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


def test_the_tools_explain_wrong_results_and_waits() -> None:
    from tools import hopper_right

    want = torch.randn(1, 2, 200, 64)
    got = want.clone()
    assert hopper_right.wrong("output", got, want, 64, 2) == ""
    got[0, 1, 70, 5] = 9.0
    found = hopper_right.wrong("output", got, want, 64, 2)
    assert "first at [0, 1, 70, 5], in tiles [1]" in found
    shape = hopper.DEFAULTS[128]
    status = torch.zeros(16 * 12 * 4, dtype=torch.int32)
    status.view(-1, 12, 4)[3, 5] = torch.tensor([1 + 4, 1, 135, 7])
    assert hopper_right.waiting(status, shape) == [
        "block 3, warp 5 (consumer 0): key full 0, parity 1, tile 135, step 7"
    ]


@pytest.mark.parametrize("tool", ["hopper_right", "hopper_speed"])
def test_the_tools_name_what_is_missing(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = __import__(f"tools.{tool}", fromlist=["main"])
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    with pytest.raises(SystemExit):
        module.main([])
    assert "no Hopper GPU to run on" in capsys.readouterr().err


@pytest.mark.parametrize("head_dim", hopper.HEAD_DIMS)
def test_the_steps_of_the_check_make_valid_inputs(head_dim: int) -> None:
    from tools import hopper_right

    for step in hopper_right.steps(hopper.DEFAULTS[head_dim], head_dim):
        small = replace(step, heads=1, batch=min(step.batch, 2))
        query, key, value, arguments = hopper_right.make(small, head_dim, "cpu")
        assert query.shape == (small.batch, 1, step.queries, head_dim)
        assert key.shape == value.shape == (small.batch, 1, step.keys, head_dim)
        assert arguments.start + arguments.n_rows <= step.queries
