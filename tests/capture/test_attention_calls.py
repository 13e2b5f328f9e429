"""Attention calls that a captured processor may make, in a model with one attention module."""

import shutil
import threading

import pytest
import torch
import torch.nn.functional as F
from reference_maps import map_of
from torch import nn

from star_kernels import TokenSelection
from star_kernels.capture import capture_maps

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 12, 8
ROWS = {"rows": (4, 6), "grid": (2, 3), "call": 0}
INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
)


class Processor:
    """Attends to given queries, keys and values with given options."""

    def __call__(self, module, options):
        first = F.scaled_dot_product_attention(*module.qkv, **options)
        return first + F.scaled_dot_product_attention(*(2 * t for t in module.qkv))


class Attention(nn.Module):
    def __init__(self, key_heads=HEADS):
        super().__init__()
        heads = (HEADS, key_heads, key_heads)
        self.qkv = [torch.randn(BATCH, h, LENGTH, WIDTH) for h in heads]
        self.processor = Processor()

    def forward(self, options):
        return self.processor(self, options)


class Model(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.attention = Attention(**arguments)

    def forward(self, **options):
        return self.attention(options)


@pytest.fixture
def selection():
    return TokenSelection.from_positions([[0, 1], [2]])


def padding():
    return torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 3]])


def additive(mask, value=-torch.inf):
    return torch.zeros(mask.shape).masked_fill(~mask, value)


MASKS = {
    "bool [B, 1, 1, Sk]": lambda: padding()[:, None, None],
    "bool [1, 1, 1, Sk]": lambda: padding()[1:, None, None],
    "bool [B, H, 1, Sk]": lambda: padding()[:, None, None].expand(-1, HEADS, -1, -1),
    "additive [B, 1, 1, Sk]": lambda: additive(padding())[:, None, None],
    "additive [B, H, 1, Sk]": lambda: additive(padding(), -1e4)[:, None, None].repeat(1, HEADS, 1, 1),
    "additive in bfloat16's digits": lambda: additive(padding(), -9984.0)[:, None, None],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_of_keys_is_kept(mask, selection):
    model, mask = Model(), mask()
    expected = model(attn_mask=mask)
    with capture_maps(model, selection, cfg=None, **ROWS) as maps:
        torch.testing.assert_close(model(attn_mask=mask), expected)
    query, key, _ = model.attention.qkv
    expected_map = map_of((query, key, mask.expand(BATCH, -1, -1, -1)), selection, ROWS["rows"])
    torch.testing.assert_close(maps.value.flatten(2), expected_map)


def causal():
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


WRONG = {
    "of other keys": ({"attn_mask": causal()[:, 1:]}, r"mask of shape \[12, 11\].* = \[2, 4, 12, 12\]"),
    "of a batch": ({"attn_mask": padding()}, r"mask of shape \[2, 12\], which cannot be expanded"),
    "a bias": ({"attn_mask": torch.linspace(-2, 0, LENGTH).expand(BATCH, 1, 1, -1)}, "must be 0 or -inf"),
    "of all keys": ({"attn_mask": torch.full((BATCH, 1, 1, LENGTH), -1e4)}, "with at least one 0"),
    "of each head": (
        {"attn_mask": torch.stack([padding()] * 3 + [~padding()], dim=1)[:, :, None]},
        "differs between heads",
    ),
    "causal": ({"is_causal": True}, "is_causal=True"),
    "dropout": ({"dropout_p": 0.1}, "dropout_p=0.1"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_an_unsupported_attention_call_is_an_error_that_names_the_module(options, message, selection):
    model = Model()
    with pytest.raises(ValueError, match=f"attention .*{message}"), capture_maps(model, selection, cfg=None, **ROWS):
        model(**options)


def per_head():
    return torch.rand(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5


BY_QUERY = {
    "[B, 1, Sq, Sk]": lambda: causal() & padding()[:, None, None],
    "[1, 1, Sq, Sk]": lambda: causal()[None, None],
    "[B, H, Sq, Sk], rows without a key": per_head,
    "[H, Sq, Sk]": lambda: per_head()[0],
    "[Sq, Sk]": causal,
    "additive": lambda: additive(causal() & padding()[:, None, None]),
    "a bias": lambda: torch.linspace(-2, 1, LENGTH * LENGTH).view(LENGTH, LENGTH),
    "of keys in effect": lambda: padding()[:, None, None].expand(-1, 1, LENGTH, -1),
    "transposed strides": lambda: per_head().mT.contiguous().mT,
}


@pytest.mark.parametrize("chunk", [64 << 20, 1])
@pytest.mark.parametrize("mask", BY_QUERY.values(), ids=BY_QUERY)
def test_a_mask_of_each_query_leaves_the_output_to_the_model(mask, chunk, selection, monkeypatch):
    monkeypatch.setattr("star_kernels.capture.biased_maps.CHUNK_BYTES", chunk)
    model, mask = Model(), mask()
    leaves = model.attention.qkv = [t.requires_grad_() for t in model.attention.qkv]
    expected = model(attn_mask=mask)
    with capture_maps(model, selection, cfg=None, detach=False, **ROWS) as maps:
        out = model(attn_mask=mask)
    if mask.stride(-2):
        assert torch.equal(out, expected)
    query, key, _ = leaves
    scores = query @ key.mT * WIDTH**-0.5
    bias = mask if mask.dtype != torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    # A row without any key has maps and gradients of 0.
    attention = (scores + bias).softmax(dim=-1).masked_fill(bias == -torch.inf, 0.0).mean(dim=1)
    reference = torch.stack([attention[0, :, 0] + attention[0, :, 1], attention[1, :, 2]])[:, 4:10].reshape(
        BATCH, 1, 2, 3
    )
    torch.testing.assert_close(maps.value, reference, rtol=0, atol=1e-6)
    weights = torch.randn_like(reference)
    found = torch.autograd.grad((maps.value * weights).sum(), leaves[:2])
    torch.testing.assert_close(found, torch.autograd.grad((reference * weights).sum(), leaves[:2]))


def test_masks_of_each_query_are_not_for_our_attention(selection):
    options = {"cfg": None, "output": "ours", **ROWS}
    with (
        pytest.raises(ValueError, match=r"differs by query, .*capture with output='auto' or 'model'"),
        capture_maps(model := Model(), selection, **options),
    ):
        model(attn_mask=causal())


def test_maps_with_a_mask_of_each_query_are_constants_by_default(selection):
    model = Model()
    model.attention.qkv = [t.requires_grad_() for t in model.attention.qkv]
    with capture_maps(model, selection, cfg=None, **ROWS) as maps:
        assert model(attn_mask=causal()).requires_grad
    assert not maps.value.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_maps_with_a_mask_of_each_query_in_other_dtypes(dtype, selection):
    model = Model()
    model.attention.qkv = [t.to(dtype) for t in model.attention.qkv]
    with capture_maps(model, selection, cfg=None, **ROWS) as maps:
        model(attn_mask=causal())
    wide = [t.double() for t in model.attention.qkv[:2]]
    tolerance = 1e-6 if dtype == torch.bfloat16 else 1e-12
    expected = map_of((*wide, causal()[None, None]), selection, ROWS["rows"])
    torch.testing.assert_close(maps.value.flatten(2).double(), expected, rtol=0, atol=tolerance)


def test_a_compiled_graph_keeps_a_mask_of_each_query(selection):
    torch._dynamo.reset()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(attn_mask=causal())
    with capture_maps(compiled, selection, cfg=None, **ROWS) as maps:
        torch.testing.assert_close(compiled(attn_mask=causal()), expected)
    query, key, _ = model.attention.qkv
    expected_map = map_of((query, key, causal()[None, None]), selection, ROWS["rows"])
    torch.testing.assert_close(maps.value.flatten(2), expected_map, rtol=0, atol=1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager", INDUCTOR])
def test_a_compiled_graph_keeps_a_mask_and_and_checks_it_too(compiler, selection):
    torch._dynamo.reset()
    model, mask = Model(), additive(padding())[:, None, None]
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    expected = model(attn_mask=mask)
    expected_map = map_of((*model.attention.qkv[:2], mask), selection, ROWS["rows"])
    with capture_maps(compiled, selection, cfg=None, **ROWS) as maps:
        torch.testing.assert_close(compiled(attn_mask=mask), expected)
        torch.testing.assert_close(maps.value.flatten(2), expected_map)
        with pytest.raises(RuntimeError, match="must be 0 or -inf"):
            compiled(attn_mask=torch.full((BATCH, 1, 1, LENGTH), -1.0))


def test_scale_and_grouped_heads_are_kept(selection):
    model = Model(key_heads=2)
    options = {"scale": 0.7, "enable_gqa": True}
    query, key, _ = model.attention.qkv
    first = F.scaled_dot_product_attention(*model.attention.qkv, **options)
    model.attention.processor = type("First", (), {"__call__": lambda self, module, options: _first(module, options)})()
    with capture_maps(model, selection, cfg=None, **ROWS) as maps:
        torch.testing.assert_close(model(**options), first)
    scaled = query * 0.7 * WIDTH**0.5, key.repeat_interleave(2, dim=1), None
    torch.testing.assert_close(maps.value.flatten(2), map_of(scaled, selection, ROWS["rows"]))


def _first(module, options):
    return F.scaled_dot_product_attention(*module.qkv, **options)


def test_rows_must_lie_in_the_queries(selection):
    model = Model()
    with (
        pytest.raises(ValueError, match="attention has 12 queries, which do not include the image rows 8 to 13"),
        capture_maps(model, selection, cfg=None, rows=(8, 6), grid=(2, 3)),
    ):
        model()


def test_attention_not_computed_by_pytorch_is_an_error_at_the_end_of_the_pass(selection):
    class Other:
        _attention_backend = "sage"

        def __call__(self, module, options):
            return module.qkv[0] + 1

    model = Model()
    model.attention.processor = Other()
    with (
        pytest.raises(
            RuntimeError, match=r'no maps from attention: .*backend: sage.*set_attention_backend\("native"\)'
        ),
        capture_maps(model, selection, cfg=None, **ROWS),
    ):
        model()


def test_context_parallelism_is_an_error(selection):
    model = Model()
    with capture_maps(model, selection, cfg=None, **ROWS):
        model.attention.processor._parallel_config = object()  # as enable_parallelism sets it
        with pytest.raises(ValueError, match="attention uses context parallelism"):
            model()


def test_an_error_of_the_model_itself_is_not_hidden(selection):
    model = Model()
    with capture_maps(model, selection, cfg=None, **ROWS), pytest.raises(TypeError, match="unexpected keyword"):
        model(unknown=1)


def test_several_modules_may_share_one_processor(selection):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Attention(), Attention()
            self.b.processor = self.a.processor

        def forward(self):
            return self.a({}) + self.b({})

    model = Pair()
    with capture_maps(model, selection, cfg=None, **ROWS) as maps:
        model()
    expected = [map_of((*m.qkv[:2], None), selection, ROWS["rows"]) for m in (model.a, model.b)]
    torch.testing.assert_close(maps.value.flatten(2), torch.stack(expected).mean(dim=0))
    assert model.a.processor is model.b.processor


class OwnName:
    """Keeps the function under a name of its own."""

    def __init__(self, function):
        self.function = function

    def __call__(self, module, options):
        self.calls = getattr(self, "calls", 0) + 1
        return self.function(*module.qkv, **options)


def test_a_processor_may_call_the_function_under_another_name_and_runs_once(selection):
    model = Model()
    model.attention.processor = OwnName(F.scaled_dot_product_attention)
    expected = model()
    with capture_maps(model, selection, cfg=None, **ROWS) as maps:
        model()
        torch.testing.assert_close(model(), expected)
        assert model.attention.processor.calls == 3  # one before, and one for each call of the model
    torch.testing.assert_close(maps.value.flatten(2), map_of((*model.attention.qkv[:2], None), selection, ROWS["rows"]))


def test_pytorchs_function_is_replaced_only_while_a_processor_runs(selection):
    pytorch = F.scaled_dot_product_attention
    seen = []

    class Looks:
        def __call__(self, module, options):
            seen.append(F.scaled_dot_product_attention)
            if options:
                raise KeyError("a processor's own")
            return F.scaled_dot_product_attention(*module.qkv)

    model = Model()
    model.attention.processor = Looks()
    with capture_maps(model, selection, cfg=None, **ROWS):
        assert F.scaled_dot_product_attention is pytorch
        model()
        assert F.scaled_dot_product_attention is pytorch
        with pytest.raises(KeyError, match="a processor's own"):
            model(scale=1.0)
        assert F.scaled_dot_product_attention is pytorch
    assert pytorch not in seen


def test_attention_in_other_threads_is_not_intercepted(selection):
    others = []

    class Waits:
        def __call__(self, module, options):
            def attend():
                others.append(F.scaled_dot_product_attention(*(3 * t for t in module.qkv)))

            thread = threading.Thread(target=attend)
            thread.start()
            thread.join()
            return F.scaled_dot_product_attention(*module.qkv)

    model = Model()
    model.attention.processor = Waits()
    with capture_maps(model, selection, cfg=None, **ROWS) as maps:
        model()
    torch.testing.assert_close(others[0], F.scaled_dot_product_attention(*(3 * t for t in model.attention.qkv)))
    torch.testing.assert_close(maps.value.flatten(2), map_of((*model.attention.qkv[:2], None), selection, ROWS["rows"]))


def test_a_processor_that_does_not_attend_runs_once(selection):
    """Its random numbers are drawn once."""
    runs = []

    class Noise:
        def __call__(self, module, options):
            runs.append(torch.rand(()))
            return module.qkv[0]

    model = Model()
    model.attention.processor = Noise()
    for _ in range(2):
        torch.manual_seed(0)
        drawn = torch.rand(())
        torch.manual_seed(0)
        with capture_maps(model, selection, cfg=None, **ROWS), pytest.raises(RuntimeError, match="no maps"):
            model()
        assert runs.pop() == drawn
        assert not runs


def test_a_function_mode_is_used_only_for_the_first_eager_call_of_a_processor_class(selection):
    """A mode adds microseconds to every call of a PyTorch function."""
    depths = []

    class Counts:
        def __call__(self, module, options):
            depths.append(torch.overrides._len_torch_function_stack())
            return F.scaled_dot_product_attention(*module.qkv)

    model = Model()
    model.attention.processor = Counts()
    with capture_maps(model, selection, cfg=None, **ROWS):
        model()
        model()
    model.attention.processor = Counts()
    with capture_maps(model, selection, cfg=None, **ROWS):
        model()
    assert depths == [1, 0, 0]
