"""``attention`` as an operator: schemas, compiled graphs, and the instruction sets of the native maps."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from attention_cases import EXPANDED, Case, Inputs, expanded, last_dimension_strided, make, sliced, transposed
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import TokenSelection, attention, attention_maps, native


def _operator_arguments(inputs: Inputs, requires_grad: bool) -> tuple:
    start, length = 2, inputs.query.shape[2] - 2
    tensors = [t.detach().clone().requires_grad_(requires_grad) for t in inputs.tensors]
    return (*tensors, inputs.selection.index, inputs.selection.weight, inputs.key_mask, start, length, 0.3)


@pytest.mark.parametrize(
    ("dtype", "reduce_heads", "masked"),
    mostly_exhaustive(
        itertools.product([torch.float32, torch.bfloat16], [True, False], ["", "some"]),
        [(torch.float32, True, "some"), (torch.bfloat16, False, "")],
    ),
    ids=str,
)
def test_operators_pass_opcheck(
    dtype: torch.dtype, reduce_heads: bool, masked: str, attention_backend: tuple[str, str]
) -> None:
    backend, device = attention_backend
    if backend == "naive":
        pytest.skip("the reference is not an operator")
    inputs = make(Case((2, 2, 9, 11, 8), [[1, 2], [0]], masked=masked), dtype, device)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    arguments = (*_operator_arguments(inputs, True), reduce_heads, backend)
    torch.library.opcheck(torch.ops.star_kernels.attention.default, arguments, **tolerance)

    with torch.no_grad():
        arguments = (*_operator_arguments(inputs, False), reduce_heads, backend)
        out, maps, lse = torch.ops.star_kernels.attention(*arguments)
        grads = [torch.randn_like(t) for t in (out, maps, lse)]
        query, key, value, *rest = arguments
        for given in (grads, [grads[0], None, None], [None, grads[1], None], [None, None, grads[2]]):
            torch.library.opcheck(
                torch.ops.star_kernels.attention_backward.default,
                (*given, query, key, value, out, lse, *rest),
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize(
    "view",
    mostly_exhaustive([transposed, sliced, last_dimension_strided, *EXPANDED], lambda view: view in (sliced, expanded)),
    ids=lambda f: f.__name__,
)
def test_operators_pass_opcheck_on_strided_inputs(view: Callable, attention_backend: tuple[str, str]) -> None:
    backend, device = attention_backend
    if backend == "naive":
        pytest.skip("the reference is not an operator")
    inputs = make(Case((2, 2, 9, 11, 8), [[1, 2], [0]]), torch.float32, device)
    _, _, _, *rest = _operator_arguments(inputs, False)
    tensors = [view(t).detach().requires_grad_() for t in inputs.tensors]
    torch.library.opcheck(torch.ops.star_kernels.attention.default, (*tensors, *rest, True, backend))


@pytest.mark.parametrize("compiler", mostly_exhaustive(["aot_eager", "inductor"], ["aot_eager"]))
def test_compiles_to_one_graph_and_is_right_for_other_selections_and_shapes(
    compiler: str, attention_backend: tuple[str, str]
) -> None:
    backend, device = attention_backend
    if backend == "naive":
        pytest.skip("the reference is plain PyTorch, without an operator")

    def loss(query: Tensor, key: Tensor, value: Tensor, selection: TokenSelection) -> Tensor:
        out, maps, lse = attention(query, key, value, selection, rows=(0, 5), return_lse=True, backend=backend)
        return out.square().mean() + (maps * maps).sum() + lse.mean()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    cases = [
        Case((2, 2, 19, 19, 8), [[1, 2], [0]]),
        Case((2, 2, 19, 19, 8), [[3], [11, 7]]),  # other tokens, and another largest position
        Case((2, 2, 19, 19, 8), [[18, 3], [1, 2]]),
        Case((2, 2, 33, 33, 8), [[1, 2], [0]]),  # a second length makes it dynamic
        Case((2, 2, 47, 47, 8), [[1, 2], [0]]),
        Case((2, 2, 51, 51, 8), [[1, 2, 50], [0]]),  # a second number of slots does, too
        Case((2, 2, 21, 21, 8), [[1, 2, 5, 6], [0]]),
        Case((2, 2, 22, 22, 8), [[1, 2, 5, 6, 7], [0]]),
    ]
    for seed, case in enumerate(cases if compiler == "aot_eager" else cases[:2]):  # inductor is slow
        inputs = make(case, torch.float32, device, seed)
        found = []
        for function in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in inputs.tensors]
            value = function(*leaves, inputs.selection)
            found.append([value, *torch.autograd.grad(value, leaves)])
        for eager, got in zip(*found, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)
    # One graph for the first shape, one with a dynamic length, one with a dynamic number of slots.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_call_rejects_an_index_past_the_sequence() -> None:
    inputs = make(Case((1, 2, 9, 9, 8), [[3]]), torch.float32)
    compiled = torch.compile(lambda *arguments: attention(*arguments).maps, fullgraph=True, backend="aot_eager")
    compiled(*inputs.tensors, inputs.selection)
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"9|selection.index"):
        compiled(*inputs.tensors, TokenSelection.from_positions([[9]]))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def of_queries(query: Tensor, key: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return attention_maps(query, key, None, TokenSelection(index, weight), direction="text_to_image")

    for position in (3, 9):
        index, weight = torch.tensor([[position]], dtype=torch.int32), torch.ones(1, 1, 1)
        if position == 3:
            assert of_queries(*inputs.tensors[:2], index, weight).any()
        else:
            with pytest.raises((ValueError, IndexError, RuntimeError)):
                of_queries(*inputs.tensors[:2], index, weight)


_SUBPROCESS = """
import sys, torch
from star_kernels import TokenSelection, attention, attention_maps, native
assert native.cpu().isa() == sys.argv[1], native.cpu().isa()
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for slots in (1, 3, 40):
        q, k, v = (torch.randn(2, 3, 61, 40, generator=generator).to(dtype) for _ in range(3))
        index = torch.randint(-1, 61, (2, slots), generator=generator, dtype=torch.int32)
        selection = TokenSelection(index, torch.rand(2, 2, slots, generator=generator))
        mask = torch.rand(2, 61, generator=generator) < 0.8
        for reduce_heads in (True, False):
            options = dict(rows=(3, 51), key_mask=mask, reduce_heads=reduce_heads)
            wide = (t.double() for t in (q, k, v))
            _, exact, lse = attention(*wide, selection, return_lse=True, **options)
            maps = attention_maps(q, k, lse.float(), selection, **options)
            assert maps.dtype == torch.float32
            error = float((maps - exact).abs().max())
            assert error < 1e-5, (dtype, slots, error)
print("done")
"""


@pytest.mark.native
@pytest.mark.parametrize("isa", mostly_exhaustive(["baseline", "avx2", "avx512"], ["baseline"]))
def test_every_instruction_set_that_runs_here_gives_the_same_maps(isa: str) -> None:
    if isa not in native.cpu().runnable_isas().split():
        pytest.skip(f"this processor does not run {isa}")
    done = subprocess.run(
        [sys.executable, "-c", _SUBPROCESS, isa],
        env={**os.environ, "STAR_KERNELS_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"
