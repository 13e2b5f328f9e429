"""Maps of a diffusers SD3 transformer: those of the definition, at no change to the model."""

import pytest
import torch

from star_kernels import TokenSelection
from star_kernels.attention import naive
from star_kernels.capture import capture_maps

diffusers = pytest.importorskip("diffusers")

ROWS, COLUMNS, TEXT = 6, 10, 7
IMAGE = ROWS * COLUMNS


@pytest.fixture
def model():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=64,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(4, 4, 2 * ROWS, 2 * COLUMNS, generator=generator),
        "encoder_hidden_states": torch.randn(4, TEXT, 32, generator=generator),
        "pooled_projections": torch.randn(4, 16, generator=generator),
        "timestep": torch.full((4,), 500.0),
    }


@pytest.fixture
def selection():
    return TokenSelection.from_positions([[[0], [1, 2]], [[3], []]]).shift(IMAGE)


def processors(model):
    return [block.attn.processor for block in model.transformer_blocks]


@torch.no_grad()
def expected_maps(model, inputs, selection, blocks, samples):
    """The definition, on the queries and keys that reach PyTorch's attention."""
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, **options):
        seen.append((query, key, value))
        return original(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        model(**inputs)
    joint = [call for call in seen if call[0].shape[2] == IMAGE + TEXT]
    assert len(joint) == len(model.transformer_blocks)
    maps = []
    for block in blocks:
        query, key, value = (t[samples].double() for t in joint[block])
        scale = query.shape[-1] ** -0.5
        maps.append(
            naive.attention(query, key, value, selection.index, selection.weight, None, (0, IMAGE), scale, True)[1]
        )
    return torch.stack(maps).mean(dim=0).unflatten(-1, (ROWS, COLUMNS))


@pytest.mark.parametrize(("cfg", "samples"), [("last", slice(2, 4)), ("first", slice(0, 2))])
@pytest.mark.parametrize("blocks", ["all", [2], [0, -1]])
def test_maps_are_those_of_the_definition_and_the_output_is_unchanged(model, inputs, selection, blocks, cfg, samples):
    with torch.no_grad():
        before = model(**inputs).sample
        with capture_maps(model, selection, blocks=blocks, cfg=cfg) as maps:
            during = model(**inputs).sample
        after = model(**inputs).sample
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    indices = range(3) if blocks == "all" else blocks
    expected = expected_maps(model, inputs, selection, indices, samples)
    torch.testing.assert_close(maps.value.double(), expected, rtol=0, atol=1e-5)
    assert not maps.value[1, 1].any()  # an empty group


def test_a_batch_that_is_not_doubled_is_taken_whole(model, inputs, selection):
    whole = TokenSelection(selection.index.repeat(2, 1), selection.weight.repeat(2, 1, 1))
    with torch.no_grad(), capture_maps(model, whole, cfg=None) as maps:
        model(**inputs)
    assert maps.value.shape == (4, 2, ROWS, COLUMNS)


def test_every_forward_pass_starts_anew(model, inputs, selection):
    with torch.no_grad(), capture_maps(model, selection) as maps:
        model(**inputs)
        first = maps.value
        model(**inputs)
        assert torch.equal(first, maps.value)


def test_the_model_is_restored_after_an_exception(model, inputs, selection):
    before, hooks = processors(model), len(model._forward_pre_hooks)
    with pytest.raises(KeyError), capture_maps(model, selection):
        raise KeyError
    assert all(a is b for a, b in zip(before, processors(model), strict=True))
    assert len(model._forward_pre_hooks) == hooks


def test_the_compiled_model_gives_the_same_maps_from_one_graph(model, inputs, selection):
    with torch.no_grad(), capture_maps(model, selection) as maps:
        model(**inputs)
        expected = maps.value
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), capture_maps(compiled, selection) as maps:
        compiled(**inputs)
    torch.testing.assert_close(maps.value, expected, rtol=0, atol=1e-6)


def test_gradients_of_training_pass_through_the_capture(model, inputs, selection):
    def gradient():
        model.zero_grad()
        model(**inputs).sample.square().mean().backward()
        return model.transformer_blocks[1].attn.to_q.weight.grad.clone()

    expected = gradient()
    with capture_maps(model, selection) as maps:
        torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-7)
    assert not maps.value.requires_grad


def test_bad_arguments_are_named(model, inputs, selection):
    def enter(*arguments, **options):
        with capture_maps(*arguments, **options) as maps:
            return maps

    with pytest.raises(TypeError, match="transformer must be one of SD3Transformer2DModel, got Linear"):
        enter(torch.nn.Linear(1, 1), selection)
    with pytest.raises(TypeError, match="selection must be a TokenSelection, got list"):
        enter(model, [1])
    with pytest.raises(ValueError, match="cfg must be 'last', 'first' or None, got 'both'"):
        enter(model, selection, cfg="both")
    for blocks in ("some", [], [3], [0, 0], [0, -3], [0.5]):
        with pytest.raises(ValueError, match="blocks must be 'all' or distinct indices below 3"):
            enter(model, selection, blocks=blocks)
    with pytest.raises(RuntimeError, match="no maps yet: 0 of 3 chosen blocks"):
        _ = enter(model, selection).value
    with pytest.raises(ValueError, match=r"batch of 4 .twice the selection's 2.*got 2"), capture_maps(model, selection):
        model(**{name: value[:2] for name, value in inputs.items()})
    model.transformer_blocks[1].attn.processor = object()
    with pytest.raises(TypeError, match=r"JointAttnProcessor2_0 .* got object"):
        enter(model, selection)
