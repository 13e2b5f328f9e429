"""Captures beside the attention backend that the user chose with diffusers' dispatcher."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import kernel_stand_ins
from diffusers.models.attention_dispatch import (
    _HUB_KERNELS_REGISTRY,
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from dispatched import BATCH, HEADS, LENGTH, ROWS, WIDTH, Model, captured, padding, stand_ins
from reference_maps import expected_maps, map_of
from tiny_models import CASES

from star_kernels import TokenSelection
from star_kernels.capture import attach_maps, capture_maps
from star_kernels.capture.backends import BACKENDS

ELSEWHERE = ("_native_npu", "_native_xla", "_native_cudnn", "_native_efficient")  # not on a CPU
NAMES = [name for name in BACKENDS if name not in ELSEWHERE]


@pytest.fixture(autouse=True)
def packages():
    with stand_ins():
        yield


@pytest.fixture
def selection():
    return TokenSelection.from_positions([[0, 1], [2]])


def test_the_table_has_every_backend_of_diffusers():
    assert {member.value for member in _AttentionBackendRegistry._backends} <= {*BACKENDS, "native"}


MASKS = {
    "none": "none",
    "sdpa": "as PyTorch",
    "keys": "of keys; masks of queries and heads are reduced to what any of them attends to",
    "count": "the number of keys; the first ones take part",
    "flex": "as PyTorch, `BlockMask`; `[B, S]` is of queries",
    "xformers": "`[B, Sk]`, or additive",
    "unknown": "an error",
}


def documented(row):
    layouts = {"bhs": "`[B, H, Sq]`", "bsh": "`[B, Sq, H]`", "packed": "`[H, B * Sq]`"}
    lse = f"`{row.lse}=True`" if row.lse else "none: a second pass"
    layout = layouts[row.layout] if row.lse else ""
    exact = ("" if not row.lse else "exact" if row.exact else "of 8-bit queries and keys") + (
        "" if row.compiled else "; a second pass if compiled"
    )
    return f"| `{row.name}` | {lse} | {layout} | {exact} | {MASKS[row.mask]} |"


def test_the_table_of_the_docs_is_that_of_the_code():
    text = (Path(__file__).parents[2] / "docs" / "maps.md").read_text(encoding="utf-8")
    table = text.partition("| backend | asked")[2].partition("\n\n")[0].splitlines()[2:]
    assert table == [documented(row) for row in BACKENDS.values()]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_that_of_the_backend_and_the_maps_are_its_own(name, selection):
    model = Model(name)
    expected = model()
    out, maps = captured(model, selection)
    assert torch.equal(out, expected)
    torch.testing.assert_close(maps, map_of(model.call(), selection, ROWS["rows"]), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if BACKENDS[name].lse and name != "flash_4_hub"])
def test_a_log_sum_exp_is_used_where_there_is_one(name, selection):
    model = Model(name)
    with warnings.catch_warnings(action="error"), capture_maps(model, selection, cfg=None, **ROWS):
        model()


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if not BACKENDS[name].lse or name == "flash_4_hub"])
def test_a_second_pass_is_announced(name, selection):
    with (
        pytest.warns(UserWarning, match=rf"^{name} returns no log-sum-exp .*output='ours' computes it once"),
        capture_maps(Model(name), selection, cfg=None, **ROWS) as maps,
    ):
        maps._model()


@torch.no_grad()
@pytest.mark.parametrize("name", ["flash", "_flash_3", "_flash_3_hub", "flash_varlen_hub", "sage"])
def test_grouped_heads_and_a_scale_are_followed(name, selection):
    model = Model(name, key_heads=2)
    options = {"scale": 0.7}
    expected = model(**options)
    out, maps = captured(model, selection, **options)
    assert torch.equal(out, expected)
    call = model.call(scale=0.7 * WIDTH**0.5)
    torch.testing.assert_close(maps, map_of(call, selection, ROWS["rows"]), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["flash", "_native_math"])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_our_attention_may_compute_the_output_of_any_backend(name, key_heads, selection, monkeypatch):
    model = Model(name, key_heads)
    expected = model(enable_gqa=True)
    monkeypatch.setattr(kernel_stand_ins, "attend", None)
    with capture_maps(model, selection, cfg=None, output="ours", **ROWS) as maps:
        torch.testing.assert_close(model(enable_gqa=True), expected)
    torch.testing.assert_close(maps.value.flatten(2), map_of(model.call(), selection, ROWS["rows"]))


@torch.no_grad()
@pytest.mark.parametrize("name", [None, "native"])
def test_the_native_backend_is_ours_unless_the_models_is_asked_for(name, selection):
    model = Model(name)
    expected = model()
    with (
        pytest.warns(UserWarning, match="F.scaled_dot_product_attention returns no log-sum-exp"),
        capture_maps(model, selection, cfg=None, output="model", **ROWS) as maps,
    ):
        assert torch.equal(model(), expected)
    torch.testing.assert_close(maps.value.flatten(2), map_of(model.call(), selection, ROWS["rows"]))
    with warnings.catch_warnings(action="error"):
        captured_again = captured(model, selection)
    torch.testing.assert_close(captured_again[1], maps.value.flatten(2), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_active_backend_counts_too(selection, monkeypatch):
    model = Model()
    with attention_backend("_native_math"):
        expected = model()
        with pytest.warns(UserWarning, match="_native_math"), capture_maps(model, selection, cfg=None, **ROWS):
            assert torch.equal(model(), expected)


def test_differentiable_maps_are_those_of_a_second_pass(selection):
    """The packages compute no gradient of their log-sum-exp."""
    model = Model("flash")
    leaves = model.attention.qkv = [t.requires_grad_() for t in model.attention.qkv]
    with (
        pytest.warns(UserWarning, match="flash"),
        capture_maps(model, selection, cfg=None, detach=False, **ROWS) as maps,
    ):
        model()
    weights = torch.randn_like(maps.value)
    found = torch.autograd.grad((maps.value * weights).sum(), leaves[:2])
    expected = torch.autograd.grad(
        (map_of(model.call(), selection, ROWS["rows"]) * weights.flatten(2)).sum(), leaves[:2]
    )
    torch.testing.assert_close(found, expected)
    with capture_maps(model, selection, cfg=None, **ROWS) as maps:
        model()
    assert not maps.value.requires_grad


WRONG = {
    "a bool mask of xformers": (
        "xformers",
        {"attn_mask": torch.ones(BATCH, 1, LENGTH, LENGTH) > 0},
        "adds to the scores as 0 and 1",
    ),
    "a bias": ("flex", {"attn_mask": torch.linspace(-2, 0, LENGTH).expand(BATCH, 1, 1, -1)}, "must be 0 or -inf"),
    "an additive mask": ("flash_varlen", {"attn_mask": padding().float()}, "whose meaning .* flash_varlen is unknown"),
    "a window": ("flash", {"attention_kwargs": {"window_size": (3, 3)}}, r"flash with window_size=\(3, 3\)"),
    "a cap": ("_flash_3_hub", {"attention_kwargs": {"softcap": 5.0}}, "_flash_3_hub with softcap=5.0"),
    "a result": ("flash", {"attention_kwargs": {"return_lse": True}}, "with return_lse=True"),
    "context parallelism": ("flash", {"parallel_config": object()}, "with context parallelism"),
    "causal": ("flash", {"is_causal": True}, "is_causal=True"),
    "dropout": ("flash", {"dropout_p": 0.1}, "dropout_p=0.1"),
    "a mask that the backend refuses": ("flash", {"attn_mask": padding()}, "not supported for flash-attn 2"),
}


@pytest.mark.parametrize(("name", "options", "message"), WRONG.values(), ids=WRONG)
def test_calls_that_maps_would_not_follow_are_errors(name, options, message, selection):
    with pytest.raises(ValueError, match=message):
        captured(Model(name), selection, **options)


def test_a_backend_that_ignores_a_scale_has_maps_without_it(selection, monkeypatch):
    """_native_xla has no such argument, and diffusers drops it."""

    def xla(q, k, v, causal):
        return kernel_stand_ins.attend(*(t.transpose(1, 2) for t in (q, k, v)), 1.0)[0].transpose(1, 2)

    monkeypatch.setattr("diffusers.models.attention_dispatch.xla_flash_attention", xla)
    model = Model("_native_xla")
    expected = model(scale=0.7)
    torch.testing.assert_close(expected, model.exact())
    out, maps = captured(model, selection, scale=0.7)
    assert torch.equal(out, expected)
    torch.testing.assert_close(maps, map_of(model.call(), selection, ROWS["rows"]))


# Conventions that a version of a package might have, or a mistake in the table.
CONVENTIONS = {
    "base 2": (lambda lse: lse / torch.log(torch.tensor(2.0)), "differs by up to"),
    "heads last": (lambda lse: lse.transpose(1, 2), "of shape .*2, 12, 4"),
    "heads reversed": (lambda lse: lse.flip(1), "differs by up to"),
    "unscaled": (lambda lse: lse + 1.0, "differs by up to 1"),
    "NaN": (lambda lse: lse * torch.nan, "differs by up to nan"),
}


@pytest.mark.parametrize(("change", "message"), CONVENTIONS.values(), ids=CONVENTIONS)
def test_another_convention_of_the_log_sum_exp_is_an_error(change, message, selection, monkeypatch):
    def changed(*args, **kwargs):
        found = kernel_stand_ins.flash_2(*args, **kwargs)
        return (found[0], change(found[1]), None) if isinstance(found, tuple) else found

    monkeypatch.setattr("diffusers.models.attention_dispatch.flash_attn_func", changed)
    with pytest.raises(ValueError, match=f"{message}.*choose another attention backend"):
        captured(Model("flash"), selection)


@torch.no_grad()
def test_a_padded_log_sum_exp_is_cut(selection, monkeypatch):
    def padded(*args, **kwargs):
        found = kernel_stand_ins.flash_2(*args, **kwargs)
        pad = nn.functional.pad
        return (found[0], pad(found[1], (0, 116)), None) if isinstance(found, tuple) else found

    monkeypatch.setattr("diffusers.models.attention_dispatch.flash_attn_func", padded)
    model = Model("flash")
    torch.testing.assert_close(captured(model, selection)[1], map_of(model.call(), selection, ROWS["rows"]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["_flash_3_varlen_hub", "flash_4_hub"])
def test_a_version_without_a_log_sum_exp_gets_a_second_pass(name, selection, monkeypatch):
    function = {"_flash_3_varlen_hub": kernel_stand_ins.flash_3_varlen, "flash_4_hub": kernel_stand_ins.flash_4}[name]
    monkeypatch.setattr(_HUB_KERNELS_REGISTRY[AttentionBackendName(name)], "kernel_fn", function)
    model = Model(name)
    with pytest.warns(UserWarning, match=name), capture_maps(model, selection, cfg=None, **ROWS) as maps:
        model()
    torch.testing.assert_close(maps.value.flatten(2), map_of(model.call(), selection, ROWS["rows"]))


@torch.no_grad()
def test_a_backend_that_the_table_does_not_have_gets_a_second_pass(selection, monkeypatch):
    def own(query, key, value, attn_mask=None):
        return kernel_stand_ins.attend(query, key, value, None)[0]

    name = AttentionBackendName._NATIVE_XLA
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, own)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value", "attn_mask"})
    monkeypatch.delitem(BACKENDS, "_native_xla")
    model = Model("_native_xla")
    expected = model()
    out, maps = captured(model, selection)
    assert torch.equal(out, expected)
    torch.testing.assert_close(maps, map_of(model.call(), selection, ROWS["rows"]))
    with pytest.raises(ValueError, match="whose meaning for the attention backend _native_xla is unknown"):
        captured(model, selection, attn_mask=padding())


def test_the_registry_is_restored(selection, monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_backends", dict(_AttentionBackendRegistry._backends))
    before = dict(_AttentionBackendRegistry._backends)
    first, second = (attach_maps(Model(), selection, cfg=None, **ROWS) for _ in range(2))
    assert _AttentionBackendRegistry._backends != before
    first.remove()
    first.remove()
    assert _AttentionBackendRegistry._backends != before
    second.remove()
    assert _AttentionBackendRegistry._backends == before
    first = attach_maps(Model(), selection, cfg=None, **ROWS)
    other = _AttentionBackendRegistry._backends[AttentionBackendName.FLASH] = object()  # registered meanwhile
    first.remove()
    assert _AttentionBackendRegistry._backends.pop(AttentionBackendName.FLASH) is other
    _AttentionBackendRegistry._backends = dict(before)
    with pytest.raises(TypeError):
        attach_maps(Model(), "tokens", cfg=None, **ROWS)
    assert _AttentionBackendRegistry._backends == before


@torch.no_grad()
@pytest.mark.parametrize("name", ["native", "_native_math", "flash", "_flash_3"])
def test_a_compiled_model_has_the_same_maps(name, selection):
    torch._dynamo.reset()
    model = Model(name)
    expected = model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), expected)
    with (
        warnings.catch_warnings(action="ignore"),
        capture_maps(compiled, selection, cfg=None, output="model", **ROWS) as maps,
    ):
        torch.testing.assert_close(compiled(), expected)
    torch.testing.assert_close(maps.value.flatten(2), map_of(model.call(), selection, ROWS["rows"]))
    torch.testing.assert_close(compiled(), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "name"),
    [("flux", "flash"), ("flux", "_flash_3_hub"), ("flux2", "_native_math"), ("qwen-image", "flash_varlen_hub")],
)
def test_real_models(family, name):
    case = CASES[family]
    model, inputs = case.make()
    expected = expected_maps(model, inputs, case, case.selection)
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = name
    out = model(**inputs).sample
    with warnings.catch_warnings(action="ignore"), capture_maps(model, case.selection, cfg=None) as maps:
        assert torch.equal(model(**inputs).sample, out)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-6)
