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
    "of each query": ({"attn_mask": causal().expand(BATCH, 1, -1, -1)}, r"mask of shape \[2, 1, 12, 12\]"),
    "without a batch": ({"attn_mask": causal()}, r"mask of shape \[12, 12\].* \[B, Sk\] with B = 2, Sk = 12"),
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


@pytest.mark.parametrize("compiler", ["aot_eager", INDUCTOR])
def test_a_compiled_graph_keeps_a_mask_and_checks_it_too(compiler, selection):
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
