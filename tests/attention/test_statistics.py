"""The statistics of ``attention_maps``, and maps without a given log-sum-exp, against materialised probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from fuzzing.memory import guarded_library
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import AttentionStatistics, TokenSelection, attention_maps, native
from star_kernels.attention import statistics as operators

NAMES = ("token_entropy", "token_sums", "key_entropy", "key_sums")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Each: shape [B, H, Sq, Sk, D], rows, shape of the mask by query, key mask, whether heads are averaged, scale
CASES: dict[str, tuple] = {
    "plain": ((2, 3, 63, 63, 32), None, None, False, True, None),
    "tiny": ((1, 1, 1, 1, 8), None, None, False, True, None),
    "odd": ((1, 2, 21, 19, 13), (3, 17), None, True, True, -0.4),
    "long": ((1, 2, 301, 601, 24), slice(5, 290), (1, 1, 301, 601), False, True, 2.0),
    "per_head": ((2, 3, 45, 61, 16), (1, 40), (2, 3, 45, 61), True, False, None),
    "of_keys": ((2, 3, 45, 61, 16), (1, 40), (2, 1, 1, 61), True, False, None),
    "head_dim_128": ((1, 2, 33, 70, 128), None, (1, 2, 1, 70), False, True, None),
}


class Inputs:
    def __init__(self, case: tuple, dtype: torch.dtype, device: str = "cpu", slots: int = 5) -> None:
        (batch, heads, queries, keys, width), rows, shape, by_key, reduce_heads, scale = case
        self.query, self.key = (torch.randn(batch, heads, n, width).to(dtype).to(device) for n in (queries, keys))
        index = torch.randint(-1, keys, (batch, slots), dtype=torch.int32)
        index[0, 0] = keys - 1
        if slots > 2:
            index[0, 1] = index[0, 0]  # a repeated token
            index[-1] = -1 if batch > 1 else index[-1]
        self.selection = TokenSelection(index, torch.rand(batch, 2, slots)).to(device)
        mask = key_mask = None
        if shape is not None:
            mask = torch.rand(shape) < 0.6
            if shape[2] > 1:
                mask[0, :, min(7, shape[2] - 1)] = False  # a row without any key
            mask = mask.to(device)
        if by_key:
            key_mask = (torch.rand(batch, keys) < 0.7).to(device)
        self.options = {
            "rows": rows, "attn_mask": mask, "key_mask": key_mask, "reduce_heads": reduce_heads, "scale": scale,
        }  # fmt: skip

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query, self.key]

    def run(self, backend: str, leaves: list[Tensor] | None = None, lse: Tensor | None = None) -> AttentionStatistics:
        query, key = leaves or self.leaves
        found = attention_maps(
            query, key, lse, self.selection, backend=backend, statistics=NAMES, **self.options
        )  # fmt: skip
        assert isinstance(found, AttentionStatistics)
        return found

    def textbook(self, query: Tensor, key: Tensor) -> AttentionStatistics:
        options, index, weight = self.options, self.selection.index, self.selection.weight.to(query.dtype)
        rows = options["rows"] or slice(None)
        part = rows if isinstance(rows, slice) else slice(rows[0], sum(rows))
        scale = query.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
        scores = torch.matmul(query, key.mT) * scale
        keep = torch.ones_like(scores, dtype=torch.bool)
        for mask in (options["attn_mask"], None if options["key_mask"] is None else options["key_mask"][:, None, None]):
            keep = keep if mask is None else keep & mask
        probability = torch.softmax(scores.masked_fill(~keep, -1e30), dim=-1)
        probability = probability.masked_fill(~keep, 0.0)[:, :, part]
        filled = index >= 0
        tokens = index.clamp(min=0).long()[:, None, None].expand(*probability.shape[:3], -1)
        selected = probability.gather(3, tokens) * filled[:, None, None]
        total = selected.sum(-1, keepdim=True)
        found = {
            "token_entropy": self.entropy(selected / total.masked_fill(total == 0, 1.0)),
            "token_sums": selected.sum(2),
            "key_entropy": self.entropy(probability),
            "key_sums": probability.sum(2),
        }
        maps = torch.einsum("bhrt,bgt->bghr", selected, weight)
        if options["reduce_heads"]:
            return AttentionStatistics(maps.mean(2), **{name: t.mean(1) for name, t in found.items()})
        return AttentionStatistics(maps, **found)

    @staticmethod
    def entropy(probability: Tensor) -> Tensor:
        return -(probability * torch.where(probability > 0, probability, 1.0).log()).sum(-1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    mostly_exhaustive(itertools.product(CASES, DTYPES), lambda name, dtype: dtype == torch.float32 or name == "long"),
    ids=str,
)
def test_statistics_are_those_of_the_materialised_softmax(
    name: str, dtype: torch.dtype, maps_backend: tuple[str, str], poisoned: None
) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES[name], dtype, device)
    exact = inputs.textbook(*(t.double() for t in inputs.leaves))
    for field, got, want in zip(exact._fields, inputs.run(backend), exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5, msg=lambda m, f=field: f"{f}: {m}")


@pytest.mark.parametrize("slots", [1, 17, 40])
def test_statistics_of_any_number_of_tokens(slots: int, maps_backend: tuple[str, str], poisoned: None) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES["per_head"], torch.float32, device, slots)
    exact = inputs.textbook(*(t.double() for t in inputs.leaves))
    for got, want in zip(inputs.run(backend)[:3], exact[:3], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
@pytest.mark.parametrize("name", ["odd", "per_head", "of_keys"])
def test_maps_without_a_log_sum_exp_and_their_gradients_are_those_with_it(
    name: str, direction: str, maps_backend: tuple[str, str], poisoned: None
) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES[name], torch.float32, device)
    options = {**inputs.options, "direction": direction, "rows": (2, 9)}
    if direction == "text_to_image":
        inputs.selection = TokenSelection(
            inputs.selection.index.clamp(max=inputs.query.shape[2] - 1), inputs.selection.weight
        )

    def results(lse: Callable[[Tensor, Tensor], Tensor | None], backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs.leaves]
        maps = attention_maps(*leaves, lse(*leaves), inputs.selection, backend=backend, **options)
        return [maps, *torch.autograd.grad(maps.square().sum(), leaves)]

    def given(query: Tensor, key: Tensor) -> Tensor:
        scale = query.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
        scores = torch.matmul(query, key.mT) * scale
        for mask in (options["attn_mask"], None if options["key_mask"] is None else options["key_mask"][:, None, None]):
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return torch.logsumexp(scores, dim=-1)

    got, exact = results(lambda *_: None, backend, torch.float32), results(given, "naive", torch.float64)
    for one, two in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "odd", "per_head"])
def test_gradients_of_statistics(
    name: str, maps_backend: tuple[str, str], poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ranges of rows, of which the last is shorter."""
    monkeypatch.setattr(operators, "SCORES", 5000)
    backend, device = maps_backend
    inputs = Inputs(CASES[name], torch.float32, device)
    upstream = [torch.randn(t.shape).to(device) for t in inputs.run(backend)]

    def gradients(function: Callable, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs.leaves]
        pairs = zip(function(leaves), upstream, strict=True)
        return torch.autograd.grad(sum((t * g).sum() for t, g in pairs), leaves)

    got = gradients(lambda leaves: inputs.run(backend, leaves), torch.float32)
    for one, two in zip(got, gradients(lambda leaves: inputs.textbook(*leaves), torch.float64), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)


def test_gradcheck_of_the_reference() -> None:
    inputs = Inputs(((2, 2, 4, 5, 3), slice(1, 4), (2, 1, 4, 5), True, True, None), torch.float64)
    leaves = tuple(t.requires_grad_() for t in inputs.leaves)
    assert torch.autograd.gradcheck(lambda *leaves: tuple(inputs.run("naive", list(leaves))), leaves)


def test_a_log_sum_exp_of_minus_infinity_gives_zeros(maps_backend: tuple[str, str], poisoned: None) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES["plain"], torch.float32, device)
    lse = torch.full(inputs.query.shape[:3], -torch.inf, device=device)
    assert not any(t.any() for t in inputs.run(backend, lse=lse))


def test_only_the_statistics_that_are_named_are_returned(maps_backend: tuple[str, str]) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES["plain"], torch.float32, device)
    arguments = (inputs.query, inputs.key, None, inputs.selection)
    found = attention_maps(*arguments, backend=backend, statistics=["key_sums"])
    assert [name for name, tensor in found._asdict().items() if tensor is not None] == ["maps", "key_sums"]
    assert isinstance(attention_maps(*arguments, backend=backend), Tensor)
    with pytest.raises(TypeError, match=r"statistics must be a sequence of token_entropy, .*, got 'key_sums'"):
        attention_maps(*arguments, statistics="key_sums")
    with pytest.raises(ValueError, match=r"statistics must be a sequence of token_entropy, .*, got 'entropy'"):
        attention_maps(*arguments, statistics=["entropy"])
    with pytest.raises(ValueError, match="statistics require direction='image_to_text'"):
        attention_maps(*arguments, statistics=["key_sums"], direction="text_to_image")


@pytest.mark.parametrize("masked", [False, True])
def test_operators_pass_opcheck(masked: bool) -> None:
    query, key = (torch.randn(2, 2, n, 8, requires_grad=True) for n in (9, 11))
    mask = torch.rand(2, 1, 9, 11) < 0.7 if masked else None
    library = torch.ops.star_kernels
    torch.library.opcheck(library.attention_rows.default, (query, key, mask, 0.3))
    with torch.no_grad():
        lse, entropy = library.attention_rows(query, key, mask, 0.3)
    torch.library.opcheck(library.attention_columns.default, (query, key, lse.clone().requires_grad_(), mask, 0.3))
    tensors = (query.detach(), key.detach(), lse)
    tests = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(
        library.attention_rows_backward.default, (lse, None, *tensors, entropy, mask, 0.3), **tests
    )  # fmt: skip
    torch.library.opcheck(
        library.attention_columns_backward.default, (torch.rand(2, 2, 11), *tensors, mask, 0.3), **tests
    )


def test_compiles_to_one_graph_forward_and_backward(maps_backend: tuple[str, str]) -> None:
    backend, device = maps_backend
    inputs = Inputs(CASES["per_head"], torch.float32, device)

    def loss(*leaves: Tensor) -> Tensor:
        return sum(t.square().sum() for t in inputs.run(backend, list(leaves)))

    torch._dynamo.reset()
    leaves = [t.clone().requires_grad_() for t in inputs.leaves]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for got, want in zip(compiled, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.native
def test_bits_do_not_depend_on_the_number_of_threads(threads: Callable) -> None:
    inputs = Inputs(CASES["long"], torch.float32)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(inputs.run("auto"))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.native
def test_the_kernels_write_their_outputs_only() -> None:
    for case in ("odd", "long", "tiny"):
        inputs = Inputs(CASES[case], torch.float32)
        with guarded_library():
            found = inputs.run("auto")
        assert not any(t.isnan().any() for t in found)


@pytest.mark.native
def test_strides_do_not_matter() -> None:
    inputs = Inputs(CASES["per_head"], torch.float16)
    expected = inputs.run("auto")
    inputs.query = inputs.query.transpose(1, 2).contiguous().transpose(1, 2)
    inputs.key = torch.stack([inputs.key, inputs.key], -1)[..., 0]
    inputs.options["attn_mask"] = inputs.options["attn_mask"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for got, want in zip(inputs.run("auto"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_no_matrix_of_size_s_by_s_is_materialised(peak_memory: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with a mask of one row, also where there is no kernel."""
    monkeypatch.setattr(operators, "SCORES", 1 << 20)
    length, heads = 1500, 4
    query, key = (torch.randn(1, heads, length, 16).requires_grad_() for _ in range(2))
    selection = TokenSelection.from_positions([[5, 9]])
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool)

    def step() -> None:
        found = attention_maps(query, key, None, selection, attn_mask=mask, statistics=NAMES)
        torch.autograd.grad(sum(t.sum() for t in found), (query, key))

    assert peak_memory(step) < heads * length * length * 4 * 0.8
    monkeypatch.setattr(native, "cpu", lambda: None)
    assert peak_memory(step) < heads * length * length * 4 * 0.8
