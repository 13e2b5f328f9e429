"""Regions agree with the pipelines' own ``encode_prompt``, tested with encoders that return token ids."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_tokenizers import CHAT_ENDS, clip_tokenizer, qwen_tokenizer, t5_tokenizer
from torch import Tensor, nn

from star_kernels.prompts import TextRegion, phrases, regions_of, select_tokens

diffusers = pytest.importorskip("diffusers")
PROMPTS = ["a RED bench by a lamp", "two benches, one of them a red bench on a wooden boat, and a lamp"]
WORDS = ["red", "lamp"]
IMAGE = 16


class Encoder(nn.Module):
    """A text encoder whose hidden states are token ids; the first output may be pooled, as in SD3's CLIP."""

    def __init__(self, width: int = 1, pooled_first: bool = False) -> None:
        super().__init__()
        self.width, self.pooled_first = width, pooled_first

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        states = input_ids[..., None].float().expand(-1, -1, self.width)
        return Output(states, states[:, 0] if self.pooled_first else states)


class Output:
    def __init__(self, states: Tensor, first: Tensor) -> None:
        self.hidden_states = [states] * 40
        self.pooler_output = states[:, 0]
        self.first = first

    def __getitem__(self, item: int) -> Tensor:
        assert item == 0
        return self.first


def sd3(t5: bool = True) -> tuple[Any, Callable[[Any, list[str]], Tensor]]:
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=Encoder(pooled_first=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=Encoder(pooled_first=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=Encoder(4) if t5 else None,
        tokenizer_3=t5_tokenizer(),
    )
    pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=4))
    return pipeline, lambda p, prompts: p.encode_prompt(prompts, None, None, "cpu", do_classifier_free_guidance=False)[
        0
    ]


def flux() -> tuple[Any, Callable[[Any, list[str]], Tensor]]:
    pipeline = diffusers.FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=Encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=Encoder(),
        tokenizer_2=t5_tokenizer(),
    )
    return pipeline, lambda p, prompts: p.encode_prompt(prompts, None, "cpu")[0]


def flux2(side: str) -> tuple[Any, Callable[[Any, list[str]], Tensor]]:
    parts = {"scheduler": None, "vae": None, "transformer": None}
    pipeline = diffusers.Flux2Pipeline(text_encoder=Encoder(), tokenizer=qwen_tokenizer(side), **parts)
    return pipeline, lambda p, prompts: p.encode_prompt(prompts, "cpu")[0]


def flux2_klein(side: str) -> tuple[Any, Callable[[Any, list[str]], Tensor]]:
    parts = {"scheduler": None, "vae": None, "transformer": None}
    pipeline = diffusers.Flux2KleinPipeline(text_encoder=Encoder(), tokenizer=qwen_tokenizer(side), **parts)
    return pipeline, lambda p, prompts: p.encode_prompt(prompts, "cpu")[0]


def qwen_image(side: str) -> tuple[Any, Callable[[Any, list[str]], Tensor]]:
    parts = {"scheduler": None, "vae": None, "transformer": None}
    pipeline = diffusers.QwenImagePipeline(text_encoder=Encoder(), tokenizer=qwen_tokenizer(side), **parts)
    before = pipeline.prompt_template_encode.partition("{}")[0]
    # 34 with the vocabulary of Qwen; the local tokenizer splits the template differently.
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(before)["input_ids"])
    return pipeline, lambda p, prompts: p.encode_prompt(prompts, "cpu", max_sequence_length=512)[0]


FAMILIES = {
    "sd3": sd3,
    "flux": flux,
    "flux2": lambda: flux2("right"),
    "flux2, padded left": lambda: flux2("left"),
    "flux2 klein": lambda: flux2_klein("right"),
    "flux2 klein, padded left": lambda: flux2_klein("left"),
    "qwen-image": lambda: qwen_image("right"),
    "qwen-image, padded left": lambda: qwen_image("left"),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_embeddings_at_the_selected_positions_are_those_of_the_words(family: str) -> None:
    pipeline, encode = FAMILIES[family]()
    embeddings = encode(pipeline, PROMPTS)  # [B, L, channels] of token ids
    regions = regions_of(pipeline)
    for region in regions:
        selection, _ = select_tokens(PROMPTS, [region], source=WORDS)
        channel = 1 if region.name == "clip_g" else 0
        for b, prompt in enumerate(PROMPTS):
            positions = [int(p) for p in selection.index[b] if p >= 0]
            text = region.tokenizer.decode([int(embeddings[b, p, channel]) for p in positions])
            core = phrases(prompt, WORDS)
            assert text.lower().split() == " ".join(core.words).lower().split()


def test_sd3_has_77_clip_positions_shared_by_two_encoders_then_256_of_t5() -> None:
    pipeline, encode = sd3()
    regions = {region.name: region for region in regions_of(pipeline)}
    assert list(regions) == ["clip_l", "clip_g", "t5"]
    assert [(r.start, r.length) for r in regions.values()] == [(0, 77), (0, 77), (77, 256)]
    assert encode(pipeline, PROMPTS).shape[1] == 333
    assert regions_of(pipeline, max_sequence_length=128)[2].length == 128


def test_sd3_without_t5_has_zeros_and_no_region() -> None:
    pipeline, encode = sd3(t5=False)
    assert [region.name for region in regions_of(pipeline)] == ["clip_l", "clip_g"]
    embeddings = encode(pipeline, PROMPTS)
    assert embeddings.shape[1] == 333
    assert not embeddings[:, 77:].any()


def test_encoders_can_be_chosen() -> None:
    pipeline, _ = sd3()
    assert [region.name for region in regions_of(pipeline, encoders=["t5"])] == ["t5"]
    for encoders in (["t4"], [], "t5"):
        with pytest.raises(ValueError, match="encoders must be a list of some of clip_l, clip_g, t5, got"):
            regions_of(pipeline, encoders=encoders)


def test_default_lengths_are_those_of_the_pipelines() -> None:
    for family in ("flux", "flux2", "flux2 klein", "qwen-image"):
        pipeline, encode = FAMILIES[family]()
        (region,) = regions_of(pipeline)
        assert (region.start, region.length) == (0, 512)
        if region.padded:
            assert encode(pipeline, PROMPTS).shape[1] == 512
        assert regions_of(pipeline, max_sequence_length=64)[0].length == 64


def test_a_long_prompt_is_truncated_as_in_the_pipeline() -> None:
    prompt = "owl " * 600 + "lamp"
    for family in FAMILIES:
        pipeline, encode = FAMILIES[family]()
        embeddings = encode(pipeline, [prompt])
        for region in regions_of(pipeline):
            characters = region.characters(prompt)
            ids = embeddings[0, region.start : region.start + region.length, 0].int().tolist()
            owls = [i for i, (start, stop) in enumerate(characters) if stop]
            text = region.tokenizer.decode([ids[i] for i in owls]).split()
            assert set(text) <= {"owl", "ow", "o"}, family
            assert len(characters) == region.length == len(ids)
            assert owls[-1] >= region.length - 2, family


def test_a_prompt_that_the_pipeline_would_change_is_an_error() -> None:
    pipeline, _ = flux2("right")
    with pytest.raises(ValueError, match=r"prompt must not contain '\[IMG\]'"):
        select_tokens(["a [IMG] bench"], regions_of(pipeline))


def test_a_chat_template_that_strips_the_prompt_is_detected() -> None:
    pipeline, encode = flux2_klein("right")
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content }}", "message.content | trim }}")
    pipeline.tokenizer = tokenizer
    (region,) = regions_of(pipeline)
    assert region.strips
    prompts = ["  a red bench "]
    selection, _ = select_tokens(prompts, [region], source=["red"])
    ids = encode(pipeline, prompts)[0, :, 0]
    assert tokenizer.decode([int(ids[p]) for p in selection.index[0]]) == " red"


def test_a_chat_template_without_the_prompt_is_an_error() -> None:
    pipeline, _ = flux2_klein("right")
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content | length }}"
    pipeline.tokenizer = tokenizer
    with pytest.raises(ValueError, match="the chat template must contain the prompt unchanged"):
        regions_of(pipeline)


@pytest.mark.parametrize("begins", [True, False])
def test_a_processor_adds_special_tokens_unless_its_chat_begins_with_them(begins: bool) -> None:
    processor = SimpleNamespace(
        tokenizer=clip_tokenizer(),
        apply_chat_template=lambda chat, **options: (
            ("<|startoftext|>" if begins else "") + chat[1]["content"][0]["text"]
        ),
    )
    pipeline = type("Flux2Pipeline", (), {"tokenizer": processor, "system_message": ""})()
    (region,) = regions_of(pipeline)
    assert region.special_tokens is not begins
    assert [i for i, span in enumerate(region.characters("red")) if span == (0, 3)] == [1]


def test_a_tokenizer_adds_no_special_tokens_to_a_chat() -> None:
    pipeline, encode = flux2("right")
    pipeline.tokenizer = clip_tokenizer.__wrapped__()
    pipeline.tokenizer.chat_template = "{{ messages[1].content[0].text }}"
    (region,) = regions_of(pipeline)
    (first, *_) = region.characters("red bench")
    assert first == (0, 3)
    assert pipeline.tokenizer.decode([int(encode(pipeline, ["red bench"])[0, 0, 0])]) == "red"


def test_subclasses_and_variants_are_supported_and_other_pipelines_are_not() -> None:
    class Mine(diffusers.FluxPipeline):
        pass

    pipeline = Mine.__new__(Mine)
    pipeline.register_modules(tokenizer_2=t5_tokenizer())
    assert regions_of(pipeline)[0].name == "t5"
    kontext = type("FluxKontextPipeline", (), {"tokenizer_2": t5_tokenizer()})()
    assert regions_of(kontext)[0].length == 512
    for name in ("FluxPriorReduxPipeline", "object"):
        with pytest.raises(TypeError, match=f"pipeline must be one of StableDiffusion3Pipeline.* got {name}"):
            regions_of(type(name, (), {})())
    with pytest.raises(TypeError, match=r"pipeline must be a diffusers pipeline, .* got the model Linear"):
        regions_of(nn.Linear(1, 1))


def test_every_listed_variant_exists_in_diffusers() -> None:
    from star_kernels.prompts.regions import _EDITS, _FAMILIES, _KNOWN, _REFUSED

    listed = [name for names, _ in (*_FAMILIES, *_EDITS) for name in names]
    assert [name for name in (*listed, *_REFUSED) if not hasattr(diffusers, name)] == []
    assert set(_KNOWN) <= set(listed)


def test_a_custom_region_describes_another_model() -> None:
    region = TextRegion("mine", qwen_tokenizer(), 32, start=5, prefix=CHAT_ENDS[0])
    selection, _ = select_tokens(["red"], [region])
    assert selection.index.tolist()[0][0] == 6
