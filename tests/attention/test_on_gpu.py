"""Attention on a GPU at the sizes of real models: Triton's kernels and PyTorch's, in every dtype that each takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from star_kernels import TokenSelection, attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Poisoned memory is a part of PyTorch's deterministic mode, in which its own kernels warn.
    pytest.mark.filterwarnings("ignore:.*non-deterministic", "ignore:.*does not have a deterministic"),
]
SIZES = {  # batch, heads, image tokens, text tokens, head dim
    "sd35_512": (2, 24, 1024, 333, 64),
    "sd35_1024": (1, 8, 4096, 333, 64),
    "flux_1024": (1, 6, 4096, 512, 128),
    "odd": (1, 3, 1000, 357, 72),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VENDORS = ["cudnn", "flash", "efficient"]
Problem = tuple[Tensor, Tensor, Tensor, TokenSelection, tuple[int, int]]


def make(name: str, dtype: torch.dtype) -> Problem:
    batch, heads, image, text, width = SIZES[name]
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, heads, image + text, width)
    query, key, value = (torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(3))
    chosen = [[image + (7 * t + b) % text for t in range(20)] for b in range(batch)]
    return query, key, value, TokenSelection.from_positions(chosen).to("cuda"), (0, image)


def exact(query: Tensor, key: Tensor, value: Tensor, selection: TokenSelection, rows: tuple[int, int]) -> list[Tensor]:
    """Output and maps in float64, one head at a time."""
    outs, maps = [], []
    for h in range(query.shape[1]):
        q, k, v = (t[:, h : h + 1].double() for t in (query, key, value))
        probability = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        outs.append(probability @ v)
        selected = probability[:, 0, rows[0] : sum(rows)].gather(
            2, selection.index.long()[:, None].expand(-1, rows[1], -1)
        )
        maps.append(torch.einsum("brt,bgt->bgr", selected, selection.weight.double()))
    return [torch.cat(outs, dim=1), torch.stack(maps).mean(dim=0)]


def runnable(backend: str, problem: Problem) -> None:
    try:
        attention(*problem[:4], rows=problem[4], backend=backend)
    except (ValueError, RuntimeError) as refusal:
        pytest.skip(f"{backend} does not take this: {refusal}")


@pytest.mark.parametrize("backend", ["auto", "triton", *VENDORS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_results_are_as_exact_as_pytorch(
    name: str, dtype: torch.dtype, backend: str, assert_as_exact: Callable, poisoned: None
) -> None:
    problem = make(name, dtype)
    if backend in VENDORS:
        runnable(backend, problem)
    query, key, value, selection, rows = problem
    out, maps, _ = attention(query, key, value, selection, rows=rows, backend=backend)
    exact_out, exact_maps = exact(*problem)
    pytorch = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert_as_exact("out", out, pytorch, exact_out, dtype)
    torch.testing.assert_close(maps.double(), exact_maps, rtol=0 if dtype == torch.float32 else 2**-12, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "triton", *VENDORS])
@pytest.mark.parametrize("wanted", ["out", "out and maps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sd35_512", "odd"])
def test_gradients_are_as_exact_as_pytorch(
    name: str, dtype: torch.dtype, wanted: str, backend: str, assert_as_exact: Callable, poisoned: None
) -> None:
    problem = make(name, dtype)
    if backend in VENDORS:
        runnable(backend, problem)
    *tensors, selection, rows = problem
    upstream = torch.randn_like(tensors[0])
    upstream_maps = torch.randn(len(upstream), 1, rows[1], device="cuda")

    def gradients(inputs: list[Tensor], function: Callable) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        out, maps = function(leaves)
        loss = (out * upstream.to(out.dtype)).sum()
        if wanted != "out":
            loss = loss + (maps * upstream_maps).sum()
        return torch.autograd.grad(loss, leaves)

    def textbook(leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        probability = torch.softmax(leaves[0] @ leaves[1].transpose(-1, -2) * leaves[0].shape[-1] ** -0.5, dim=-1)
        slots = selection.index.long()[:, None, None].expand(-1, probability.shape[1], rows[1], -1)
        selected = probability[:, :, rows[0] : sum(rows)].gather(3, slots)
        maps = torch.einsum("bhrt,bgt->bgr", selected, selection.weight.to(selected.dtype)) / probability.shape[1]
        return probability @ leaves[2], maps

    got = gradients(tensors, lambda leaves: attention(*leaves, selection, rows=rows, backend=backend)[:2])
    pytorch = gradients(tensors, textbook)
    reference = gradients([t.double() for t in tensors], textbook)
    for part, *grads in zip(("query", "key", "value"), got, pytorch, reference, strict=True):
        assert_as_exact(f"gradient of {part}", *grads, dtype)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", SIZES)
def test_maps_are_bitwise_repeatable(name: str, backend: str) -> None:
    query, key, value, selection, rows = make(name, torch.bfloat16)
    first = attention(query, key, value, selection, rows=rows, backend=backend).maps
    for _ in range(20):
        assert torch.equal(first, attention(query, key, value, selection, rows=rows, backend=backend).maps)


@pytest.mark.parametrize("name", SIZES)
def test_dependent_launches_change_no_bit(name: str) -> None:
    """Twenty calls in a row, each of which overwrites the memory of the one before."""
    from star_kernels.attention import triton_forward, triton_maps
    from star_kernels.attention.arguments import MapArguments
    from star_kernels.attention.triton_config import Epilogue, overlaps_launches

    query, key, value, selection, rows = make(name, torch.bfloat16)
    if not overlaps_launches(query.device):
        pytest.skip("needs sm_90 and CUDA 12.3")
    arguments = MapArguments(selection.index, selection.weight, None, *rows, query.shape[-1] ** -0.5, True)
    _, first, lse = triton_forward.attention(query, key, value, arguments, epilogue=Epilogue(overlap=False))
    alone = triton_maps.attention_maps(query, key, lse, arguments, overlap=False)
    for _ in range(20):
        _, maps, lse = triton_forward.attention(query, key, value, arguments, epilogue=Epilogue(overlap=True))
        assert torch.equal(maps, first)
        assert torch.equal(triton_maps.attention_maps(query, key, lse, arguments, overlap=True), alone)


def test_calls_are_captured_in_a_graph_and_replay_on_new_values() -> None:
    query, key, value, selection, rows = make("sd35_512", torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            attention(query, key, value, selection, rows=rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(query, key, value, selection, rows=rows)
    for _ in range(3):
        query.normal_()
        graph.replay()
        expected = attention(query, key, value, selection, rows=rows)
        assert torch.equal(captured.maps, expected.maps)
        assert torch.equal(captured.out, expected.out)


def test_calls_on_two_streams_do_not_disturb_one_another() -> None:
    query, key, value, selection, rows = make("sd35_512", torch.bfloat16)
    expected = attention(query, key, value, selection, rows=rows).maps
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(attention(query, key, value, selection, rows=rows).maps)
    torch.cuda.synchronize()
    assert all(torch.equal(maps, expected) for maps in found)
