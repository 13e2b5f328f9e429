"""The Triton kernels against the reference, run by Triton's interpreter on a CPU.

The tests of this file run in the interpreter's process, whose output is shown if one fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiers import mostly_exhaustive
from torch import Tensor
from triton_cases import (
    CASES,
    Case,
    Inputs,
    autograd,
    bshd,
    cotangents,
    eager,
    exact,
    exact_lse,
    make,
    misaligned,
    packed,
    strided,
)
from triton_interpreter import INTERPRETED, TIERS, inner, outer, require_interpreter, run_interpreted

from star_kernels.attention import naive

require_interpreter()
if INTERPRETED:
    from star_kernels.attention import triton_backward, triton_forward, triton_maps
    from star_kernels.attention.triton_config import (
        BackwardConfig,
        Epilogue,
        Tile,
        backward_config,
        forward_config,
    )

    TILE = Tile(32, 32, 4, 1)
    BULK = Tile(32, 32, 4, 1, descriptors=True)
    TALL = Tile(64, 16, 4, 1)  # rows and columns differ, so that a mix-up shows


@outer
@pytest.mark.parametrize("tier", TIERS)
def test_in_the_interpreter(tier: str) -> None:
    run_interpreted(__file__, tier)


DTYPES = {torch.float32: list(CASES), torch.float16: ["plain", "cross", "head_dim_40", "head_dim_128", "mask_all"]}
CASES_AND_DTYPES = [(name, dtype) for dtype in DTYPES for name in DTYPES[dtype]]
QUICK = {"plain", "one", "cross_short", "phrases", "mask_all"}


def quick(name: str, dtype: torch.dtype, wanted: str = "out maps lse") -> bool:
    return wanted == "out maps lse" and name in (QUICK if dtype == torch.float32 else {"plain"})


@inner
@pytest.mark.parametrize(("name", "dtype"), mostly_exhaustive(CASES_AND_DTYPES, quick), ids=str)
def test_results_are_as_exact_as_pytorch(
    name: str, dtype: torch.dtype, assert_as_exact: Callable, poisoned: None
) -> None:
    inputs = make(CASES[name], dtype)
    out, maps, lse = triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE)
    exact_out, exact_maps, exact_lse = exact(inputs)
    assert out.dtype == dtype
    assert maps.dtype == lse.dtype == torch.float32
    assert_as_exact("out", out, eager(*inputs.tensors, inputs)[0], exact_out, dtype)
    torch.testing.assert_close(maps.double(), exact_maps, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    if inputs.case.masked == "all":
        assert not out[-1].any()
        assert not maps[-1].any()
        assert bool((lse[-1] == -torch.inf).all())


ALONE = ["plain", "cross", "head_dim_40", "mask_some", "mask_all"]  # cases that also take one gradient at a time
GRADIENT_CASES = [(*case, "out maps lse") for case in CASES_AND_DTYPES]
GRADIENT_CASES += [
    (*case, wanted) for case in CASES_AND_DTYPES if case[0] in ALONE for wanted in ("out", "maps", "lse")
]


def kernel_gradients(inputs: Inputs, upstream: list[Tensor | None], config: BackwardConfig | None) -> tuple:
    dtype = inputs.tensors[0].dtype
    grad_out, grad_maps, grad_lse = (
        None if g is None else g.to(d) for g, d in zip(upstream, (dtype, torch.float32, torch.float32), strict=True)
    )
    out, _, lse = triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE)
    return triton_backward.attention_backward(
        grad_out, grad_maps, grad_lse, *inputs.tensors, out, lse, inputs.arguments, config=config
    )


@inner
@pytest.mark.parametrize(("name", "dtype", "wanted"), mostly_exhaustive(GRADIENT_CASES, quick), ids=str)
def test_gradients_are_as_exact_as_pytorch(
    name: str, dtype: torch.dtype, wanted: str, assert_as_exact: Callable, poisoned: None
) -> None:
    inputs = make(CASES[name], dtype)
    upstream = cotangents(inputs, wanted)
    got = kernel_gradients(inputs, upstream, BackwardConfig(TALL, TILE))
    reference = autograd(lambda *tensors: eager(*tensors, inputs), inputs, dtype, upstream)
    truth = autograd(lambda *t: naive.attention(*t, inputs.arguments), inputs, torch.float64, upstream)
    for tensor, *grads in zip(("query", "key", "value"), got, reference, truth, strict=True):
        assert grads[0].dtype == dtype
        assert_as_exact(f"gradient of {tensor}", *grads, dtype)


@inner
@pytest.mark.parametrize("text_to_image", [False, True], ids=["image_to_text", "text_to_image"])
@pytest.mark.parametrize(("name", "dtype"), mostly_exhaustive(CASES_AND_DTYPES, quick), ids=str)
def test_maps_from_a_log_sum_exp_match_the_reference(
    name: str, dtype: torch.dtype, text_to_image: bool, poisoned: None
) -> None:
    case = CASES[name]
    if text_to_image:  # swap the lengths, so that the selected positions and the rows stay in range
        batch, heads, queries, keys, width = case.shape
        case = replace(case, shape=(batch, heads, keys, queries, width), rows=case.rows or (0, queries))
    inputs = make(case, dtype)
    query, key, _ = inputs.tensors
    if text_to_image:
        inputs.index = inputs.index.where(inputs.index < 0, inputs.index % query.shape[2])
    wide = [t.double() for t in inputs.tensors]
    lse = exact_lse(inputs)
    arguments = inputs.arguments._replace(text_to_image=text_to_image)
    got = triton_maps.attention_maps(query, key, lse.float(), arguments, config=TILE)
    expected = naive.attention_maps(wide[0], wide[1], lse, arguments)
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=1e-5)


PAIRS = {  # shape of the mask by query
    "plain": (1, 1, 63, 63),
    "six_phrases_of_forty": (1, 2, 63, 63),
    "rows": (2, 1, 1, 40),
    "mask_all": (2, 2, 40, 64),
}


@inner
@pytest.mark.parametrize("text_to_image", [False, True], ids=["image_to_text", "text_to_image"])
@pytest.mark.parametrize("name", PAIRS)
def test_maps_with_a_mask_by_query_match_the_reference(name: str, text_to_image: bool, poisoned: None) -> None:
    inputs = make(CASES[name], torch.float32)
    query, key, _ = inputs.tensors
    mask = torch.rand(PAIRS[name]) < 0.6
    mask[0, :, 0] = False
    if text_to_image:
        query, key, mask = key, query, mask.expand(-1, -1, query.shape[2], -1).mT
        inputs.key_mask = None
    lse = exact_lse(replace(inputs, tensors=(query, key, key)), mask)
    arguments = inputs.arguments._replace(text_to_image=text_to_image, attn_mask=mask)
    expected = naive.attention_maps(query.double(), key.double(), lse, arguments)
    got = triton_maps.attention_maps(query, key, lse.float(), arguments, config=TILE)
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=1e-5)
    lse[0, 0] = -torch.inf
    got = triton_maps.attention_maps(query, key, lse.float(), arguments._replace(attn_mask=None), config=TILE)
    expected = naive.attention_maps(query.double(), key.double(), lse, arguments._replace(attn_mask=None))
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=1e-5)


@inner
@pytest.mark.parametrize("change", mostly_exhaustive([bshd, packed, strided, misaligned], [strided]))
def test_any_strides_give_the_same_results(change: Callable, poisoned: None) -> None:
    inputs = make(Case((2, 3, 40, 50, 24), phrases=2, masked="some"), torch.float32)
    upstream = cotangents(inputs, "out maps lse")
    other = replace(
        inputs,
        tensors=tuple(map(change, inputs.tensors)),
        index=strided(inputs.index[:, None, None])[:, 0, 0],
        weight=inputs.weight.transpose(1, 2).contiguous().transpose(1, 2),
        key_mask=inputs.key_mask.t().contiguous().t(),
    )
    expected = triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE)
    got = triton_forward.attention(*other.tensors, other.arguments, config=TILE)
    if change is not strided:
        assert got[0].stride() == torch.empty_like(other.tensors[0]).stride()  # the layout that compiled callers expect
    config = BackwardConfig(TILE, TILE)
    expected += kernel_gradients(inputs, upstream, config)
    others = [g.expand(2, *g.shape)[1] if g.ndim < 4 else bshd(g) for g in upstream]
    got += kernel_gradients(other, others, config)
    for one, two in zip(expected, got, strict=True):
        assert torch.equal(one, two)


@pytest.mark.exhaustive
@inner
@pytest.mark.parametrize(
    ("architecture", "width"),
    [("sm_80", 32), ("sm_80", 64), ("sm_80", 128), ("sm_90", 128)],
)
def test_the_shipped_configurations_give_the_same_results(architecture: str, width: int, poisoned: None) -> None:
    inputs = make(Case((1, 1, 140, 133, width), phrases=2), torch.float16)
    upstream = cotangents(inputs, "out maps lse")
    expected = triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE)
    expected += kernel_gradients(inputs, upstream, BackwardConfig(TILE, TALL))
    forward, backward = (f(architecture, width, torch.float16) for f in (forward_config, backward_config))
    got = triton_forward.attention(*inputs.tensors, inputs.arguments, config=forward)
    got += kernel_gradients(inputs, upstream, backward)
    for one, two in zip(expected, got, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-3)


EPILOGUES = [("keys", False), ("keys", True), ("scores", False), ("scores", True)]
EARLY_CASES = {
    "simple": Case((1, 2, 70, 50, 32)),
    "phrases_and_mask": Case((1, 3, 70, 50, 32), phrases=5, masked="some"),
    "chunks": Case((1, 2, 20, 50, 16), slots=37),
    "everything": Case((2, 2, 70, 50, 16), slots=37, phrases=3, masked="all", rows=(33, 30), reduce_heads=False),
}


@inner
@pytest.mark.parametrize(
    ("name", "tokens", "output_last"),
    mostly_exhaustive(
        [(name, *epilogue) for name in EARLY_CASES for epilogue in EPILOGUES],
        lambda name, tokens, output_last: tokens == "scores" and output_last == (name == "everything"),
    ),
)
def test_every_epilogue_gives_the_same_results(name: str, tokens: str, output_last: bool, poisoned: None) -> None:
    inputs = make(EARLY_CASES[name], torch.float16)
    late, early = Epilogue(), Epilogue(tokens, output_last)
    expected = triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE, epilogue=late)
    got = triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE, epilogue=early)
    for one, two in zip(expected, got, strict=True):
        assert torch.equal(one, two)


@inner
@pytest.mark.parametrize("text_to_image", [False, True])
@pytest.mark.parametrize(("programs", "slots"), mostly_exhaustive([(1, 5), (1, 37), (15, 5), (15, 37)], [(15, 5)]))
def test_a_program_of_the_maps_kernel_may_have_several_tiles(
    programs: int, slots: int, text_to_image: bool, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tiles, of which the last is not full: all in one program, or two and one."""
    inputs = make(Case((2, 5, 70, 70, 16), slots=slots, phrases=2, masked="some"), torch.float32)
    wide = [t.double() for t in inputs.tensors]
    lse = exact_lse(inputs)
    arguments = inputs.arguments._replace(text_to_image=text_to_image)
    expected = naive.attention_maps(*wide[:2], lse, arguments)
    monkeypatch.setattr(triton_maps, "resident_programs", lambda _: programs)
    got = triton_maps.attention_maps(*inputs.tensors[:2], lse.float(), arguments, config=TILE)
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=1e-5)


@inner
@pytest.mark.parametrize("shape", [(2, 3, 24, 70), (1, 1, 1, 5), (1, 2, 9, 300)])
def test_the_mean_over_heads(shape: tuple[int, int, int, int], poisoned: None) -> None:
    maps = torch.rand(shape)
    mean = triton_maps.mean_over_heads(maps, overlap=False)
    torch.testing.assert_close(mean.double(), maps.double().mean(dim=2), rtol=1e-6, atol=0.0)


BULK_CASES = ["plain", "one", "full_tiles", "cross", "cross_short", "head_dim_72", "rows", "mask_all", "scale_negative"]


@inner
@pytest.mark.parametrize("name", mostly_exhaustive(BULK_CASES, ["plain", "mask_all"]))
def test_descriptors_give_the_same_results(name: str, assert_as_exact: Callable, poisoned: None) -> None:
    inputs = make(CASES[name], torch.float16)
    out, maps, lse = triton_forward.attention(*inputs.tensors, inputs.arguments, config=BULK)
    exact_out, exact_maps, exact_lse = exact(inputs)
    assert_as_exact("out", out, eager(*inputs.tensors, inputs)[0], exact_out, torch.float16)
    torch.testing.assert_close(maps.double(), exact_maps, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    others = tuple(map(bshd, inputs.tensors))
    for one, two in zip(
        (out, maps, lse), triton_forward.attention(*others, inputs.arguments, config=BULK), strict=True
    ):
        assert torch.equal(one, two)


@inner
def test_tensors_that_bulk_copies_cannot_read_are_loaded_by_pointers() -> None:
    odd = make(Case((1, 2, 20, 33, 13)), torch.float16)
    expanded = make(Case((2, 2, 20, 33, 16)), torch.float16)
    expanded.tensors = tuple(t[:1].expand(2, -1, -1, -1) for t in expanded.tensors)
    for inputs in (odd, expanded):
        got = triton_forward.attention(*inputs.tensors, inputs.arguments, config=BULK)
        expected = triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE)
        for one, two in zip(expected, got, strict=True):
            assert torch.equal(one, two)


@pytest.mark.exhaustive
@inner
def test_positions_past_the_sequence_are_empty_slots(poisoned: None) -> None:
    """torch.compile does not check values, so the kernels must not read at such a position."""
    inputs = make(Case((2, 2, 40, 40, 32), slots=5, phrases=2), torch.float32)
    upstream = cotangents(inputs, "out maps lse")
    lse = exact_lse(inputs).float()

    def everything(replacement: list[int]) -> list[Tensor]:
        inputs.index[:, 1:4] = torch.tensor(replacement, dtype=torch.int32)
        results = [*triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE)]
        results += kernel_gradients(inputs, upstream, BackwardConfig(TILE, TILE))
        for text_to_image in (False, True):
            arguments = inputs.arguments._replace(text_to_image=text_to_image)
            results.append(triton_maps.attention_maps(*inputs.tensors[:2], lse, arguments, config=TILE))
        return results

    for one, two in zip(everything([-1, -1, -1]), everything([40, 2**31 - 1, -(2**31)]), strict=True):
        assert torch.equal(one, two)


@inner
def test_weights_that_cancel_still_have_their_gradient(assert_as_exact: Callable, poisoned: None) -> None:
    inputs = make(Case((1, 2, 40, 40, 16), slots=4), torch.float32)
    inputs.index[:] = torch.tensor([1, 2, 3, 4])
    inputs.weight[:] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    upstream = cotangents(inputs, "maps")
    got = kernel_gradients(inputs, upstream, BackwardConfig(TALL, TILE))
    arguments = inputs, torch.float32, upstream
    reference = autograd(lambda *tensors: eager(*tensors, inputs), *arguments)
    truth = autograd(lambda *t: naive.attention(*t, inputs.arguments), inputs, torch.float64, upstream)
    assert truth[1].any()
    for tensor, *grads in zip(("query", "key", "value"), got, reference, truth, strict=True):
        assert_as_exact(f"gradient of {tensor}", *grads, torch.float32)


@pytest.mark.exhaustive
@inner
@pytest.mark.parametrize("reduce_heads", [True, False])
def test_any_layout_of_the_gradient_of_maps_gives_the_same_results(reduce_heads: bool, poisoned: None) -> None:
    inputs = make(Case((2, 3, 40, 50, 16), phrases=2, rows=(5, 30), reduce_heads=reduce_heads), torch.float32)
    upstream = cotangents(inputs, "out maps")
    maps = torch.randn(2, 2, *([] if reduce_heads else [3]), 1).expand(upstream[1].shape)  # as from a mean over rows
    config = BackwardConfig(TILE, TILE)
    expected = kernel_gradients(inputs, [upstream[0], maps.contiguous(), None], config)
    for layout in (maps, maps.transpose(0, -1).contiguous().transpose(0, -1)):
        assert layout.stride(-1) != 1
        for one, two in zip(expected, kernel_gradients(inputs, [upstream[0], layout, None], config), strict=True):
            assert torch.equal(one, two)


@inner
@pytest.mark.parametrize("reduce_heads", [True, False])
def test_equal_calls_give_equal_bits(reduce_heads: bool) -> None:
    inputs = make(Case((2, 5, 40, 40, 16), phrases=2, slots=20, reduce_heads=reduce_heads), torch.float32)
    upstream = cotangents(inputs, "out maps lse")
    first, second = (
        triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE)
        + kernel_gradients(inputs, upstream, BackwardConfig(TILE, TILE))
        for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@inner
def test_rows_outside_the_range_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither before the maps of the first row and head nor after those of the last."""
    inputs = make(Case((1, 3, 128, 40, 16), rows=(33, 20)), torch.float32)
    lse = exact_lse(inputs).float()
    for run in (
        lambda: triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE),
        lambda: triton_maps.attention_maps(*inputs.tensors[:2], lse, inputs.arguments, config=TILE),
    ):
        memory = torch.full((200 + 3 * 20,), -7.0)
        monkeypatch.setattr(triton_maps, "empty_maps", lambda *_, m=memory: m[100:-100].view(1, 1, 3, 20))
        monkeypatch.setattr(triton_forward, "empty_maps", triton_maps.empty_maps)
        run()
        assert bool((memory[:100] == -7.0).all())
        assert bool((memory[-100:] == -7.0).all())
        assert bool((memory[100:-100] >= 0.0).all())


@inner
def test_the_forward_kernel_without_maps_gives_the_same_output() -> None:
    inputs = make(Case((1, 2, 40, 40, 16)), torch.float32)
    with_maps = triton_forward.attention(*inputs.tensors, inputs.arguments, config=TILE)
    out, maps, lse = triton_forward.attention(*inputs.tensors, inputs.arguments, with_maps=False, config=TILE)
    assert maps is None
    assert torch.equal(out, with_maps[0])
    assert torch.equal(lse, with_maps[2])
