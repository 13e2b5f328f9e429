"""Which attention call of a processor a capture takes: that with the text among its keys, or an error."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import tiny_calls
from reference_maps import attention_calls, expected_maps, map_of
from tiny_models import BATCH, CASES, COLUMNS, IMAGE, ROWS, TEXT, Case

from star_kernels import TokenSelection
from star_kernels.capture import Family, ImageTokens, capture_maps, register_family

GRID = {"grid": (ROWS, COLUMNS)}


def make(name):
    return Case(getattr(tiny_calls, name), getattr(tiny_calls, f"{name}_inputs"), (0, 0), 0).make()


def tokens():
    return TokenSelection.from_positions([[[0], [1, 2]], [[3], []]])


def expected(model, inputs, selection, chosen, rows=(0, IMAGE)):
    """The mean over the calls for which ``chosen`` is true, given their order and their number of keys."""
    calls = [call for i, call in enumerate(attention_calls(model, inputs)) if chosen(i, call[1].shape[2])]
    maps = torch.stack([map_of(call, selection, rows) for call in calls])
    return maps.mean(dim=0).unflatten(-1, (ROWS, COLUMNS))


@torch.no_grad()
def check(model, inputs, selection, reference, **options):
    out = model(**inputs)[0]
    with capture_maps(model, selection, cfg=None, **options) as maps:
        torch.testing.assert_close(model(**inputs)[0], out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps.value, reference, rtol=0, atol=1e-6)


@pytest.fixture
def without_adapters(monkeypatch):
    monkeypatch.setattr("star_kernels.capture.family.FAMILIES", {})


CROSS = {"rows": (0, IMAGE), "blocks": [1, 3], **GRID}  # attn2 of both blocks of Wan, without its adapter


@torch.no_grad()
@pytest.mark.parametrize("which", [{"call": 1}, {"keys": tiny_calls.CONTEXT}, {"call": 1, "keys": tiny_calls.CONTEXT}])
def test_wan_with_an_image(which, without_adapters):
    model, inputs = make("wan")
    reference = expected(model, inputs, tokens(), lambda i, keys: keys == tiny_calls.CONTEXT)
    check(model, inputs, tokens(), reference, **CROSS, **which)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"blocks.0.attn2 makes several attention calls, with 5, 512 keys so far.* pass call=0"),
        ({"keys": 511}, r"blocks.0.attn2 should make an attention call with 511 keys.*with 5, 512 keys"),
        (
            {"call": 2},
            r"blocks.0.attn2 should make an attention call number 2 \(counted from zero\), .*with 5, 512 keys",
        ),
        ({"call": 0, "keys": 512}, r"should make an attention call number 0 \(counted from zero\) with 512 keys"),
        ({"blocks": [0], "keys": 512}, r"blocks.0.attn1 should make .*with 60 keys"),
        ({"blocks": [0]}, r"blocks.0.attn1 attends from 60 image positions to as many keys.*or pass keys=60"),
        ({"call": -1}, "call must be an integer of at least 0, got -1"),
        ({"keys": 0}, "keys must be an integer of at least 1, got 0"),
        ({"keys": True}, "keys must be an integer of at least 1, got True"),
    ],
)
def test_the_wrong_call_is_an_error(options, message, without_adapters):
    model, inputs = make("wan")
    with pytest.raises(ValueError, match=message), capture_maps(model, tokens(), cfg=None, **{**CROSS, **options}):
        model(**inputs)


@torch.no_grad()
def test_an_adapter_decides_by_the_attention_module(without_adapters):
    def image(model, arguments):
        return ImageTokens((0, IMAGE), (ROWS, COLUMNS), text=(0, tiny_calls.CONTEXT))

    family = Family(
        lambda model: [block.attn2 for block in model.blocks],
        image,
        call=lambda attention: int(attention.add_k_proj is not None),
    )
    register_family("WanTransformer3DModel", family)
    for with_image in (True, False):
        torch.manual_seed(0)
        model, inputs = tiny_calls.wan(with_image).eval(), tiny_calls.wan_inputs(with_image)
        reference = expected(model, inputs, tokens(), lambda i, keys: keys == tiny_calls.CONTEXT)
        check(model, inputs, tokens(), reference)


@torch.no_grad()
def test_causal_text_before_the_image():
    """The processor of Qwen-Image 2.1 attends from each segment of text, and then from the image."""
    model, inputs = make("qwen_image_21")
    reference = expected(model, inputs, tokens(), lambda i, keys: keys == TEXT + IMAGE)
    check(model, inputs, tokens(), reference, rows=(0, IMAGE), keys=TEXT + IMAGE, **GRID)
    with (
        pytest.raises(ValueError, match="7 queries, which do not include the image rows"),
        capture_maps(model, tokens(), cfg=None, rows=(0, IMAGE), **GRID),
    ):
        model(**inputs)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*(flex_attention|second time)")
def test_one_call_with_a_block_mask():
    """The other processor of Qwen-Image 2.1 makes one call, whose keys are padded."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor

    model, inputs = make("qwen_image_21")
    reference = expected(model, inputs, tokens(), lambda i, keys: keys == TEXT + IMAGE)
    out = model(**inputs)[0]
    for block in model.transformer_blocks:
        block.attn.processor = QwenImage21FlexAttnProcessor()
    torch.testing.assert_close(model(**inputs)[0], out, rtol=1e-4, atol=1e-4)
    check(model, inputs, tokens(), reference, rows=(TEXT, IMAGE), keys=128, **GRID)


@torch.no_grad()
def test_the_second_attention_of_sd35_is_not_captured():
    case = CASES["sd3.5"]
    model, inputs = case.make()
    with capture_maps(model, case.selection, cfg=None) as maps:
        assert not [module.name for module in maps._modules if "attn2" in module.name]
        model(**inputs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "text", "rows", "second"),
    [("sd3_with_image_prompt", IMAGE, (0, IMAGE), (1, 3, 5)), ("flux_with_image_prompt", 0, (TEXT, IMAGE), (1,))],
)
def test_image_prompts_come_after_the_text(name, text, rows, second):
    """With as many keys as the call with the text."""
    model, inputs = make(name)
    assert {key.shape[2] for _, key, _ in attention_calls(model, inputs)} == {TEXT + IMAGE}
    reference = expected(model, inputs, tokens().shift(text), lambda i, keys: i not in second, rows)
    check(model, inputs, tokens(), reference)


@torch.no_grad()
def test_image_prompts_of_a_unet():
    model, inputs = make("unet_with_image_prompt")
    assert tiny_calls.PROMPT in {key.shape[2] for _, key, _ in attention_calls(model, inputs)}
    check(model, inputs, tokens(), expected_maps(model, inputs, CASES["sd"], tokens()))


@torch.no_grad()
def test_a_processor_of_parameters_is_restored():
    model, inputs = make("sd3_with_image_prompt")
    before = [block.attn.processor for block in model.transformer_blocks]
    names = set(model.state_dict())
    with capture_maps(model, tokens(), cfg=None):
        assert set(model.state_dict()) == names
        model(**inputs)
    assert all(a is b.attn.processor for a, b in zip(before, model.transformer_blocks, strict=True))
    assert set(model.state_dict()) == names


class Several(nn.Module):
    """A module whose processor makes a call for each of the given numbers of keys."""

    def __init__(self, *counts):
        super().__init__()
        self.query = torch.randn(BATCH, 2, IMAGE, 8)
        self.keys = [torch.randn(BATCH, 2, count, 8) for count in counts]
        self.processor = self.attend

    def attend(self, module):
        return sum(nn.functional.scaled_dot_product_attention(self.query, key, key) for key in self.keys)


@torch.no_grad()
def test_two_calls_with_the_same_number_of_keys_are_an_error():
    class Calls:
        def __call__(self, module):
            return module.attend(module)

    class Model(nn.Module):
        def __init__(self, *counts):
            super().__init__()
            self.attention = Several(*counts)
            self.attention.processor = Calls()

        def forward(self):
            return self.attention.processor(self.attention)

    options = {"rows": (0, IMAGE), "cfg": None, **GRID}
    model = Model(4, 7, 7)
    with (
        pytest.raises(ValueError, match=r"several attention calls, with 4, 7, 7 keys"),
        capture_maps(model, tokens(), keys=7, **options),
    ):
        model()
    for call in (0, 1, 2):
        with capture_maps(model, tokens(), call=call, **options) as maps:
            model()
        expected = map_of((model.attention.query, model.attention.keys[call], None), tokens())
        torch.testing.assert_close(maps.value.flatten(2), expected, rtol=0, atol=1e-6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with capture_maps(compiled, tokens(), call=2, **options) as maps:
        compiled()
    torch.testing.assert_close(maps.value.flatten(2), expected, rtol=0, atol=1e-6)
