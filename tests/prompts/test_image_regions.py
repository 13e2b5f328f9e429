"""Regions of recent image models agree with the pipelines' own encoding of prompts, and with what the models do to it.

The encoders of these pipelines return token ids, so the tokens at the selected positions can be decoded.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer
from torch import Tensor, nn

from star_kernels.prompts import phrases, regions_of, select_tokens
from star_kernels.prompts.pipelines import sana_region

diffusers = pytest.importorskip("diffusers")
from PIL import Image  # noqa: E402  (diffusers requires it)
from transformers import ByT5Tokenizer  # noqa: E402

PROMPTS = ["a RED bench by a lamp", 'two benches, one a red bench, a lamp and a sign that reads "Go" and "Broth"']
WORDS = ["red", "lamp"]
Encode = Callable[[list[str]], list[Tensor]]  # for each prompt the token ids of its text, in the order of the model


class Encoder(nn.Module):
    """A text encoder whose hidden states are token ids."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(d_model=1)

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        states = input_ids[..., None].float()
        return Output(states)


class Output:
    def __init__(self, states: Tensor) -> None:
        self.hidden_states = (states,) * 40
        self.last = self.last_hidden_state = states

    def __getitem__(self, item: int) -> Tensor:
        assert item == 0
        return self.last


def without_parts(name: str, **parts: Any) -> Any:
    cls = getattr(diffusers, name)
    parts = {**dict.fromkeys(("scheduler", "vae", "transformer")), **parts}
    return cls(**parts)


def ids(embeddings: Any) -> list[Tensor]:
    return [one.flatten(1)[:, 0].int() for one in embeddings]


def z_image(side: str) -> tuple[Any, Encode]:
    pipeline = without_parts("ZImagePipeline", text_encoder=Encoder(), tokenizer=qwen_tokenizer(side))
    return pipeline, lambda prompts: ids(pipeline.encode_prompt(list(prompts), "cpu")[0])


def ovis(side: str) -> tuple[Any, Encode]:
    pipeline = without_parts("OvisImagePipeline", text_encoder=Encoder(), tokenizer=qwen_tokenizer(side))
    before = pipeline._get_messages("\ue000")[0].partition("\ue000")[0]
    pipeline.user_prompt_begin_id = len(pipeline.tokenizer(before)["input_ids"])
    return pipeline, lambda prompts: ids(pipeline.encode_prompt(prompts, "cpu")[0])


def krea2(side: str) -> tuple[Any, Encode]:
    pipeline = without_parts("Krea2Pipeline", text_encoder=Encoder(), tokenizer=qwen_tokenizer(side))
    prefix = pipeline.prompt_template_encode_prefix
    # 34 and 5 with the vocabulary of Qwen; the local tokenizer splits the template differently.
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(prefix)["input_ids"])
    end = pipeline.tokenizer(pipeline.prompt_template_encode_suffix)["input_ids"]
    pipeline.prompt_template_encode_num_suffix_tokens = len(end)
    return pipeline, lambda prompts: ids(pipeline.encode_prompt(prompts, "cpu")[0])


def hunyuan_image(glyphs: bool) -> tuple[Any, Encode]:
    pipeline = without_parts(
        "HunyuanImagePipeline",
        text_encoder=Encoder(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=Encoder(),
        tokenizer_2=ByT5Tokenizer(),
        guider=None,
        ocr_guider=None,
    )
    before = pipeline.prompt_template_encode.partition("{}")[0]
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(before)["input_ids"])
    config = SimpleNamespace(text_embed_2_dim=1 if glyphs else None)
    pipeline.transformer = SimpleNamespace(config=config)

    def encode(prompts: list[str]) -> list[Tensor]:
        text, mask, glyph, glyph_mask = pipeline.encode_prompt(prompts, "cpu", batch_size=len(prompts))
        joined = []
        for one, valid, other, valid_other in zip(text, mask.bool(), glyph, glyph_mask.bool(), strict=True):
            # As in HunyuanImageTransformer2DModel.forward; ids of the other tokenizer are marked by a negative number.
            joined.append(torch.cat([-1 - other[valid_other], one[valid], one[~valid]]) if glyphs else one)
        return ids(joined)

    return pipeline, encode


def flux3(side: str) -> tuple[Any, Encode]:
    tokenizer = qwen_tokenizer(side)
    processor = SimpleNamespace(tokenizer=tokenizer, apply_chat_template=tokenizer.apply_chat_template)
    pipeline = type("Flux3ModularPipeline", (), {"tokenizer": processor})()
    from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep

    encode = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds
    return pipeline, lambda prompts: [ids(encode(Encoder(), processor, prompt))[0] for prompt in prompts]


def lumina2() -> tuple[Any, Encode]:
    pipeline = without_parts("Lumina2Pipeline", text_encoder=Encoder(), tokenizer=t5_tokenizer())

    def encode(prompts: list[str]) -> list[Tensor]:
        text, mask, _, _ = pipeline.encode_prompt(prompts, False, device="cpu")
        return [tokens[: int(one.sum())] for tokens, one in zip(ids(text), mask, strict=True)]

    return pipeline, encode


def sana(kind: str) -> tuple[Any, Encode]:
    tokenizer = {"qwen": lambda: qwen_tokenizer("left"), "clip": clip_tokenizer, "t5": t5_tokenizer}[kind]()
    pipeline = without_parts("SanaPipeline", text_encoder=Encoder(), tokenizer=tokenizer)
    instruction = regions_default(pipeline)
    return pipeline, lambda prompts: ids(
        pipeline.encode_prompt(prompts, False, device="cpu", complex_human_instruction=instruction)[0]
    )


def regions_default(pipeline: Any) -> list[str]:
    return inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default


def t5_only(name: str, **parts: Any) -> tuple[Any, Encode]:
    pipeline = without_parts(name, text_encoder=Encoder(), tokenizer=t5_tokenizer(), **parts)
    return pipeline, lambda prompts: ids(
        pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)[0]
    )


def hidream() -> tuple[Any, Encode]:
    llama = qwen_tokenizer("left")
    parts = {f"{name}{n}": None for name in ("text_encoder", "tokenizer") for n in ("", "_2")}
    pipeline = without_parts(
        "HiDreamImagePipeline",
        **parts,
        text_encoder_3=Encoder(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=Encoder(),
        tokenizer_4=llama,
    )

    def encode(prompts: list[str]) -> list[Tensor]:
        t5 = pipeline._get_t5_prompt_embeds(prompts, 128, "cpu")
        states = pipeline._get_llama3_prompt_embeds(prompts, 128, "cpu")
        # As in HiDreamImageTransformer2DModel.forward.
        return ids(torch.cat([t5, states[-1], states[3]], dim=1))

    return pipeline, encode


FAMILIES: dict[str, Callable[[], tuple[Any, Encode]]] = {
    "Z-Image": lambda: z_image("right"),
    "Z-Image, padded left": lambda: z_image("left"),
    "Ovis-Image": lambda: ovis("right"),
    "Ovis-Image, padded left": lambda: ovis("left"),
    "Krea 2": lambda: krea2("right"),
    "Krea 2, padded left": lambda: krea2("left"),
    "HunyuanImage": lambda: hunyuan_image(True),
    "HunyuanImage without glyphs": lambda: hunyuan_image(False),
    "FLUX.3": lambda: flux3("right"),
    "FLUX.3, padded left": lambda: flux3("left"),
    "Lumina 2": lumina2,
    "Sana, no special tokens": lambda: sana("qwen"),
    "Sana, special token after the text": lambda: sana("t5"),
    "AuraFlow": lambda: t5_only("AuraFlowPipeline"),
    "Chroma": lambda: t5_only("ChromaPipeline"),
    "HiDream-I1": hidream,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_at_the_selected_positions_are_those_of_the_words(family: str) -> None:
    pipeline, encode = FAMILIES[family]()
    encoded = encode(list(PROMPTS))
    for region in regions_of(pipeline):
        selection, _ = select_tokens(PROMPTS, [region], source=WORDS)
        for b, prompt in enumerate(PROMPTS):
            positions = [int(p) for p in selection.index[b] if p >= 0]
            text = region.tokenizer.decode([int(encoded[b][p]) for p in positions])
            assert text.lower().split() == " ".join(phrases(prompt, WORDS).words).lower().split()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_prompt_is_truncated_as_in_the_pipeline(family: str) -> None:
    pipeline, encode = FAMILIES[family]()
    prompt = "owl " * 1500 + "lamp"
    encoded = encode([prompt])[0]
    for region in regions_of(pipeline):
        owls = [region.start + i for i, (_, stop) in enumerate(region.characters(prompt)) if stop]
        assert max(owls) < len(encoded)
        assert set(region.tokenizer.decode([int(encoded[i]) for i in owls]).split()) <= {"owl", "ow", "wl", "o", "lamp"}
        owl_ids = {int(encoded[i]) for i in owls}
        inside = [i for i, token in enumerate(encoded) if int(token) in owl_ids]
        assert set(owls) <= set(inside)
        if len(regions_of(pipeline)) == 1 and not region.prefix:
            assert owls == inside


class ImageProcessor:
    """The patches of an image as Qwen2VLImageProcessor counts them: 14 pixels square, an even number a side."""

    merge_size = 2

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, Tensor]:
        grids = [(1, 2 * round(image.height / 28), 2 * round(image.width / 28)) for image in images]
        return {"image_grid_thw": torch.tensor(grids)}


class Processor:
    """As Qwen2_5_VLProcessor: the placeholder of an image is repeated for each of its tokens."""

    image_token = "<|image_pad|>"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, ImageProcessor()

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        images = images if isinstance(images, list) else [] if images is None else [images]
        counts = [0]
        if images:
            counts += (self.image_processor(images, "pt")["image_grid_thw"].prod(dim=-1) // 4).tolist()
        pieces = [one.split(self.image_token) for one in text]
        assert all(len(one) == len(counts) for one in pieces)
        whole = ["".join(self.image_token * n + piece for n, piece in zip(counts, one, strict=True)) for one in pieces]
        return self.tokenizer(whole, padding=padding, return_tensors=return_tensors)


def edit(name: str, side: str = "right") -> Any:
    tokenizer = qwen_tokenizer(side)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]})
    pipeline = without_parts(name, text_encoder=Encoder(), tokenizer=tokenizer, processor=Processor(tokenizer))
    before = pipeline.prompt_template_encode.partition("<|vision_start|>")[0].partition("{}")[0]
    # 64 with the vocabulary of Qwen; the local tokenizer splits the template differently.
    pipeline.prompt_template_encode_start_idx = len(tokenizer(before)["input_ids"])
    return pipeline


@pytest.mark.parametrize(
    ("name", "sizes", "area"),
    [
        ("QwenImageEditPipeline", [(300, 200)], 1024 * 1024),
        ("QwenImageEditInpaintPipeline", [(90, 250)], 1024 * 1024),
        ("QwenImageEditPlusPipeline", [(300, 200)], 384 * 384),
        ("QwenImageEditPlusPipeline", [(300, 200), (64, 256)], 384 * 384),
        ("QwenImageEditPlusPipeline", [], 384 * 384),
    ],
)
def test_the_tokens_of_reference_images_move_the_prompt(name: str, sizes: list[tuple[int, int]], area: int) -> None:
    pipeline = edit(name, side="left" if len(sizes) > 1 else "right")
    module = sys.modules[type(pipeline).__module__]
    scaled = [module.calculate_dimensions(area, width / height)[:2] for width, height in sizes]
    images: Any = [Image.new("RGB", size) for size in scaled] or None
    if name != "QwenImageEditPlusPipeline":
        images = images[0]
    (region,) = regions_of(pipeline, images=sizes or None)
    for prompt in PROMPTS:
        embeddings, _ = pipeline.encode_prompt([prompt], images, "cpu")
        selection, _ = select_tokens([prompt], [region], source=WORDS)
        text = region.tokenizer.decode([int(embeddings[0, p, 0]) for p in selection.index[0] if p >= 0])
        assert text.lower().split() == " ".join(phrases(prompt, WORDS).words).lower().split()
    assert len(region.prefix.split("<|image_pad|>")) - 1 >= len(sizes)
    given = [Image.new("RGB", size) for size in sizes] or None
    assert regions_of(pipeline, images=given)[0].prefix == region.prefix


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [
        ("QwenImageEditPipeline", None, "images must be a list of one reference image"),
        ("QwenImageEditPipeline", [(8, 8), (8, 8)], "images must be a list of one reference image"),
        ("QwenImageEditPlusPipeline", [(8, 0)], r"images must be a list of PIL images or of pairs \(width, height\)"),
        ("QwenImageEditPlusPipeline", ["a.png"], r"images must be a list of PIL images or of pairs \(width, height\)"),
    ],
)
def test_wrong_reference_images_are_an_error(name: str, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regions_of(edit(name), images=images)


def test_other_pipelines_take_no_reference_images() -> None:
    pipeline, _ = FAMILIES["AuraFlow"]()
    with pytest.raises(ValueError, match="images must be None for AuraFlowPipeline, whose text has no reference"):
        regions_of(pipeline, images=[(8, 8)])


def test_a_prompt_with_the_placeholder_of_an_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompt must not contain"):
        select_tokens(["a <|image_pad|>"], regions_of(edit("QwenImageEditPipeline"), images=[(8, 8)]), source=["a"])


@pytest.mark.parametrize("family", ["Lumina 2", "HunyuanImage"])
def test_padding_on_the_left_is_an_error_where_the_pipeline_needs_the_right(family: str) -> None:
    pipeline, _ = FAMILIES[family]()
    pipeline.tokenizer = qwen_tokenizer("left")
    with pytest.raises(ValueError, match="tokenizer must pad on the right, got padding_side='left'"):
        regions_of(pipeline)


def test_sana_without_an_instruction_keeps_its_first_token() -> None:
    pipeline, _ = FAMILIES["Sana, no special tokens"]()
    for instruction in (None, [], ["Describe it:", "Prompt: "]):
        region = sana_region(pipeline.tokenizer, instruction=instruction)
        (embeddings,) = ids(
            pipeline.encode_prompt(["Red bench"], False, device="cpu", complex_human_instruction=instruction)[0]
        )
        selection, _ = select_tokens(["Red bench"], [region], source=["Red"])
        assert region.tokenizer.decode([int(embeddings[p]) for p in selection.index[0]]).strip() == "red"


def test_a_prompt_that_is_longer_in_lower_case_is_an_error() -> None:
    pipeline, _ = FAMILIES["Sana, no special tokens"]()
    with pytest.raises(ValueError, match="prompt must not contain text that the pipeline rewrites"):
        select_tokens(["\u0130stanbul"], regions_of(pipeline), source=["\u0130stanbul"])


def test_pipelines_whose_positions_are_unknown_say_why() -> None:
    for name, why in (
        ("ZImageOmniPipeline", "its text is in several parts"),
        ("QwenImageLayeredPipeline", "its images have several layers"),
        ("LongCatImagePipeline", "it encodes quoted text one character at a time"),
        ("HunyuanImageRefinerPipeline", "its latents have frames"),
        ("GlmImagePipeline", "its text encoder reads only the quoted text"),
    ):
        with pytest.raises(TypeError, match=f"{name} is not supported: {why}"):
            regions_of(type(name, (), {})())


@pytest.mark.parametrize("family", ["AuraFlow", "Krea 2", "Z-Image", "Lumina 2", "HiDream-I1"])
def test_the_length_can_be_chosen(family: str) -> None:
    pipeline, _ = FAMILIES[family]()
    shorter = regions_of(pipeline, max_sequence_length=64)[0].length
    assert shorter < regions_of(pipeline)[0].length
    with pytest.raises(ValueError, match="length must be an integer of at least 1"):
        regions_of(pipeline, max_sequence_length=0)
