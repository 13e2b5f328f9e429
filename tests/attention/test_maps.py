"""The contract of ``attention_maps``, in both directions, and without the compiled library."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import TokenSelection, attention, attention_maps, native

DIRECTIONS = ["image_to_text", "text_to_image"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Each: shape [B, H, Sq, Sk, D], rows, which keys are masked, layout, whether heads are averaged, scale
CASES = {
    "plain": ((2, 3, 63, 63, 32), None, "", "bhsd", True, None),
    "tiny": ((2, 1, 1, 1, 8), None, "", "bhsd", True, None),
    "odd_lengths": ((1, 2, 1000, 257, 24), None, "", "bhsd", True, None),
    "parallel": ((2, 4, 300, 310, 32), None, "", "bhsd", True, None),  # work for two threads
    "joint_1357": ((1, 1, 1357, 1357, 64), (3, 1024), "", "bhsd", True, None),
    "head_dim_8": ((1, 2, 65, 33, 8), None, "", "bhsd", True, None),
    "head_dim_128": ((1, 2, 65, 130, 128), slice(1, -1), "", "bhsd", False, None),
    "head_dim_odd": ((1, 2, 21, 19, 13), None, "", "bhsd", True, None),
    "bshd": ((2, 3, 45, 61, 16), (1, 40), "", "bshd", True, None),
    "bshd_per_head": ((2, 3, 45, 61, 16), slice(None, 33), "some", "bshd", False, None),
    "rows_slice": ((2, 3, 63, 70, 16), slice(-31, None), "some", "bhsd", True, None),
    "mask": ((2, 3, 63, 70, 16), None, "some", "bhsd", True, None),
    "mask_all": ((2, 3, 63, 70, 16), None, "all", "bhsd", False, None),
    "pairs": ((2, 3, 63, 70, 16), (7, 50), "pairs", "bhsd", True, None),
    "pairs_per_head": ((2, 3, 45, 61, 16), slice(None, 33), "pairs heads", "bshd", False, None),
    "pairs_of_queries": ((2, 3, 63, 70, 16), None, "pairs some", "bhsd", True, -0.2),
    "pairs_of_keys": ((2, 3, 63, 70, 16), (3, 9), "pairs heads row", "bhsd", True, None),
    "scale": ((2, 3, 63, 70, 16), None, "", "bhsd", True, 0.7),
    "scale_negative": ((2, 3, 63, 70, 16), None, "some", "bhsd", True, -0.2),
}
SLOTS = [1, 3, 40]


class Inputs:
    """Random tensors of a case, with the log-sum-exp of all keys, and the same in float64."""

    def __init__(self, case: tuple, dtype: torch.dtype, device: str, direction: str, slots: int = 3, phrases: int = 2):
        (batch, heads, queries, keys, width), rows, masked, layout, reduce_heads, scale = case
        generator = torch.Generator().manual_seed(0)
        query, key = (torch.randn(batch, heads, n, width, generator=generator).to(dtype) for n in (queries, keys))
        mask = pairs = None
        if "pairs" in masked:  # a row without any key, unless all rows have the same
            size = (batch, heads if "heads" in masked else 1, 1 if "row" in masked else queries, keys)
            pairs = torch.rand(size, generator=generator) < 0.6
            pairs[:, :, 0, 0] = True
            if "row" not in masked:
                pairs[0, :, min(9, queries - 1)] = False
        if masked.replace("pairs", "").replace("heads", "").replace("row", "").strip():
            mask = torch.rand(batch, keys, generator=generator) < 0.7
            mask[:, 0] = True
            if masked == "all":
                mask[-1] = False
        scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double()) * (
            width**-0.5 if scale is None else scale
        )
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        if pairs is not None:
            scores = scores.masked_fill(~pairs, -torch.inf)
        self.lse = torch.logsumexp(scores, dim=-1)
        gathered = queries if direction == "text_to_image" else keys
        index = torch.randint(-1, gathered, (batch, slots), generator=generator, dtype=torch.int32)
        index[0, 0] = gathered - 1
        if slots > 2:
            index[0, 1] = index[0, 0]  # a repeated token
            index[-1] = -1  # an empty sequence
        weight = torch.rand(batch, phrases, slots, generator=generator)
        if phrases > 1:
            weight[:, 1] = 0  # an empty phrase
        if layout == "bshd":
            query, key = query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous()
        self.tensors = tuple(t.to(device) for t in (query, key, self.lse.to(torch.float32)))
        self.selection = TokenSelection(index, weight).to(device)
        self.options = {
            "rows": rows,
            "key_mask": None if mask is None else mask.to(device),
            "attn_mask": None if pairs is None else pairs.to(device),
            "layout": layout,
            "reduce_heads": reduce_heads,
            "scale": scale,
            "direction": direction,
        }

    def run(self, backend: str, tensors: tuple[Tensor, ...] | None = None) -> Tensor:
        return attention_maps(*(tensors or self.tensors), self.selection, backend=backend, **self.options)

    def textbook(self, query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        """The map from the whole matrix of probabilities and a weight for each position."""
        options, selection = self.options, self.selection
        if options["layout"] == "bshd":
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        scale = query.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
        exponent = torch.matmul(query, key.transpose(-1, -2)) * scale - lse[..., None].clamp(min=-1e4)
        if options["key_mask"] is not None:
            exponent = exponent.masked_fill(~options["key_mask"][:, None, None], -torch.inf)
        if options["attn_mask"] is not None:
            exponent = exponent.masked_fill(~options["attn_mask"], -torch.inf)
        probability = exponent.exp()
        if options["direction"] == "text_to_image":
            probability = probability.transpose(-1, -2)  # rows are keys, columns the selected queries
        per_position = torch.zeros(*selection.weight.shape[:2], probability.shape[-1] + 1, dtype=query.dtype)
        for b in range(selection.batch):
            for t in range(selection.tokens):
                per_position[b, :, selection.index[b, t]] += selection.weight[b, :, t].to(query.dtype).cpu()
        maps = torch.einsum("bhrp,bgp->bghr", probability, per_position[..., :-1].to(query.device))
        rows = options["rows"]
        if rows is not None:
            maps = maps[..., rows if isinstance(rows, slice) else slice(rows[0], sum(rows))]
        return maps.mean(dim=2) if options["reduce_heads"] else maps


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_exhaustive(itertools.product(CASES, DTYPES), lambda name, dtype: dtype == torch.float32 or name == "plain"),
    ids=str,
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_maps_are_within_1e5_of_the_materialised_softmax(
    name: str, direction: str, dtype: torch.dtype, maps_backend: tuple[str, str], poisoned: None
) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES[name], dtype, device, direction)
    maps = inputs.run(backend)
    exact = inputs.textbook(*(t.double() for t in inputs.tensors))
    assert maps.dtype == torch.float32
    assert maps.shape == exact.shape
    torch.testing.assert_close(maps.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("phrases", [1, 5])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_any_number_of_tokens_and_phrases(
    direction: str, phrases: int, slots: int, maps_backend: tuple[str, str], poisoned: None
) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES["mask"], torch.float32, device, direction, slots, phrases)
    exact = inputs.textbook(*(t.double() for t in inputs.tensors))
    torch.testing.assert_close(inputs.run(backend).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wide", ["bhsd", "bshd"])
def test_maps_from_the_lse_are_those_of_attention(wide: str, maps_backend: tuple[str, str]) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES["bshd" if wide == "bshd" else "mask"], torch.float32, device, "image_to_text")
    options = {k: v for k, v in inputs.options.items() if k not in ("direction", "attn_mask")}
    query, key, _ = inputs.tensors
    result = attention(query, key, key, inputs.selection, return_lse=True, **options)
    again = attention_maps(query, key, result.lse, inputs.selection, backend=backend, **options)
    torch.testing.assert_close(again, result.maps, rtol=1e-6, atol=1e-7)


def test_text_to_image_rows_of_a_query_sum_to_one(maps_backend: tuple[str, str]) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES["mask"], torch.float32, device, "text_to_image", phrases=1)
    inputs.selection = TokenSelection.from_positions([[4], [9]]).to(device)
    torch.testing.assert_close(inputs.run(backend).sum(dim=-1), torch.ones(2, 1, device=device), rtol=0, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_exhaustive(
        itertools.product(
            ["plain", "tiny", "head_dim_128", "bshd_per_head", "rows_slice", "mask_all", "scale", "pairs_per_head"],
            DTYPES,
        ),
        lambda name, dtype: (dtype == torch.float32 and name != "head_dim_128") or name == "plain",
    ),
    ids=str,
)
def test_gradients_are_as_exact_as_pytorch(
    name: str,
    dtype: torch.dtype,
    direction: str,
    maps_backend: tuple[str, str],
    assert_as_exact: Callable,
    poisoned: None,
) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES[name], dtype, device, direction)
    upstream = torch.randn(inputs.run(backend).shape).to(device)

    def gradients(function: Callable, *dtypes: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(d, copy=True).requires_grad_() for t, d in zip(inputs.tensors, dtypes, strict=True)]
        maps = function(*leaves)
        return torch.autograd.grad(maps, leaves, upstream.to(maps.dtype))

    got = gradients(lambda *tensors: inputs.run(backend, tensors), dtype, dtype, torch.float32)
    eager = gradients(inputs.textbook, torch.float32, torch.float32, torch.float32)
    exact = gradients(inputs.textbook, *[torch.float64] * 3)
    for argument, g, e, x in zip(("query", "key", "lse"), got, eager, exact, strict=True):
        width = torch.float32 if argument == "lse" else dtype
        assert g.dtype == width
        assert_as_exact(f"gradient of {argument}", g, e, x, width)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduce_heads", [True, False])
@pytest.mark.parametrize("masked", ["", "some", "all", "pairs"])
def test_gradcheck_of_the_reference(masked: str, reduce_heads: bool, direction: str) -> None:
    inputs = Inputs(((2, 2, 4, 5, 3), slice(1, 4), masked, "bhsd", reduce_heads, None), torch.float64, "cpu", direction)
    query, key, _ = inputs.tensors
    lse = inputs.lse.clamp(min=-10)  # a numerical derivative needs finite numbers; masked rows give 0 all the same
    leaves = tuple(t.clone().requires_grad_() for t in (query, key, lse))
    assert torch.autograd.gradcheck(lambda *tensors: inputs.run("naive", tensors), leaves)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_strides_of_query_key_and_lse_do_not_matter(direction: str, maps_backend: tuple[str, str]) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES["pairs_of_queries"], torch.float32, device, direction)
    expected = inputs.run(backend)
    views = {
        "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "reversed": lambda t: t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1]),
        "last strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
        "sliced": lambda t: torch.cat([torch.full_like(t, torch.nan), t, torch.full_like(t, torch.nan)], 2)[
            :, :, t.shape[2] : 2 * t.shape[2]
        ],
    }
    for name, view in views.items():
        maps = inputs.run(backend, tuple(view(t) for t in inputs.tensors))
        torch.testing.assert_close(maps, expected, rtol=1e-6, atol=1e-7, msg=name)
    mask = inputs.options["attn_mask"]
    for other in (mask.mT.contiguous().mT, mask.expand(-1, 3, -1, -1), torch.stack([mask, ~mask], -1)[..., 0]):
        inputs.options["attn_mask"] = other
        torch.testing.assert_close(inputs.run(backend), expected, rtol=1e-6, atol=1e-7, msg=str(other.stride()))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_row_whose_log_sum_exp_is_minus_infinity_has_maps_of_zero(
    direction: str, maps_backend: tuple[str, str], poisoned: None
) -> None:
    """Also without the mask, and with weights of zero: neither infinity nor NaN, forward or backward."""
    backend, device = maps_backend
    inputs = Inputs(CASES["plain"], torch.float32, device, direction)
    query, key, lse = (t.clone().requires_grad_() for t in inputs.tensors)
    with torch.no_grad():
        lse[1] = -torch.inf
    maps = inputs.run(backend, (query, key, lse))
    assert not maps[1].any()
    assert maps[0].any()
    for gradient in torch.autograd.grad(maps.square().sum(), (query, key, lse)):
        assert gradient.isfinite().all()
        assert not gradient[1].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("masked", ["", "some", "pairs"])
@pytest.mark.parametrize("reduce_heads", [True, False])
def test_operators_pass_opcheck(reduce_heads: bool, masked: str, direction: str) -> None:
    inputs = Inputs(((2, 2, 9, 11, 8), None, masked, "bhsd", reduce_heads, None), torch.float32, "cpu", direction)
    query, key, lse = (t.clone().requires_grad_() for t in inputs.tensors)
    rest = (
        inputs.options["attn_mask"],
        inputs.selection.index,
        inputs.selection.weight,
        inputs.options["key_mask"],
        1,
        6,
        0.3,
        reduce_heads,
    )
    rest = (*rest, direction == "text_to_image")
    torch.library.opcheck(torch.ops.star_kernels.attention_maps.default, (query, key, lse, *rest))
    with torch.no_grad():
        upstream = torch.ops.star_kernels.attention_maps(query, key, lse, *rest)
        tensors = (t.detach() for t in (query, key, lse))
        torch.library.opcheck(
            torch.ops.star_kernels.attention_maps_backward.default,
            (upstream, *tensors, *rest),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiles_to_one_graph_forward_and_backward(direction: str, maps_backend: tuple[str, str]) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES["pairs_of_queries"], torch.float32, device, direction)

    def loss(*tensors: Tensor) -> Tensor:
        return inputs.run(backend, tensors).square().sum()

    torch._dynamo.reset()
    leaves = [t.clone().requires_grad_() for t in inputs.tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for got, want in zip(compiled, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_matrix_of_size_s_by_s_is_materialised(
    direction: str, maps_backend: tuple[str, str], peak_memory: Callable
) -> None:
    backend, device = maps_backend
    if device != "cpu":
        pytest.skip("other devices have their own counters")
    length, heads = 2048, 4
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, length, 16, generator=generator).requires_grad_() for _ in range(2))
    lse = torch.full((1, heads, length), 8.0, requires_grad=True)
    selection = TokenSelection.from_positions([[5, 9, 2000]])

    def step() -> tuple[Tensor, ...]:
        maps = attention_maps(query, key, lse, selection, direction=direction, backend=backend)
        return torch.autograd.grad(maps.square().sum(), (query, key, lse))

    assert peak_memory(step) < heads * length * length * 4 / 4


def test_without_the_compiled_library_results_agree_and_there_is_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = Inputs(CASES["mask"], torch.float32, "cpu", "image_to_text")
    inputs.selection = TokenSelection.from_positions([[[1, 2], [60]], [[3], []]])
    query, key, _ = inputs.tensors
    options = {k: v for k, v in inputs.options.items() if k not in ("direction", "attn_mask")}

    def results() -> list[Tensor]:
        leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
        out, maps, lse = attention(*leaves, key, inputs.selection, return_lse=True, **options)
        grads = torch.autograd.grad(out.square().sum() + maps.square().sum(), leaves)
        other = attention_maps(query, key, lse.detach(), inputs.selection, direction="text_to_image")
        return [out, maps, lse, *grads, other]

    expected = results()
    monkeypatch.setattr(native, "load", lambda name: (None, "a test took it away"))
    native.cpu.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for got, want in zip(results(), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        messages = [str(w.message) for w in caught if "star_kernels" in str(w.message)]
        assert len(messages) == 1
        assert "a test took it away" in messages[0]
    finally:
        native.cpu.cache_clear()
