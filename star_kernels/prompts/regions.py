"""The positions of the text encoders' tokens in the text of a diffusers pipeline.

According to diffusers 0.42, which is not imported. Text positions count from the first text token:

===============  ==============  =====================================================================================
family           joint sequence  text
===============  ==============  =====================================================================================
SD3, SD3.5       image, text     CLIP-L and CLIP-G (77), concatenated along channels; then T5 (256), zeros if absent
FLUX.1           text, image     T5 (512); CLIP is used for the pooled embedding only
FLUX.2           text, image     chat of a system message and the prompt, padded to 512; padding is not masked
FLUX.3           text, image     chat, padded to a multiple of 80; padding is not masked
Chroma           text, image     T5 (512)
Ovis-Image       text, image     chat without its first 28 tokens, padded to 256; padding is not masked
Qwen-Image       text, image     chat without its first 34 tokens, padded to the longest prompt, at most 512
Qwen-Image-Edit  text, image     chat with the tokens of the reference images, without its first 64 tokens
Krea 2           text, image     chat without its first 34 tokens (507), padding, the end of the chat (5)
Z-Image          image, text     chat without padding (at most 512)
HunyuanImage     image, text     quoted text, of ByT5; chat without its first 34 tokens; padding (1000 + 128 in all)
HiDream-I1       image, text     T5 (128), the last layer of Llama (128), the layer of Llama of the block (128)
AuraFlow         text, image     T5 (256), after the model's 8 registers
Lumina 2         text, image     system prompt and prompt, without padding (at most 256)
Sana             text            first token and last 299 of an instruction and the prompt in lower case (300 in all)
===============  ==============  =====================================================================================

Video pipelines are described in :mod:`star_kernels.prompts.video_regions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from star_kernels.prompts import pipelines
from star_kernels.prompts.templates import template_parts
from star_kernels.prompts.tokens import TextRegion
from star_kernels.prompts.video_regions import VIDEO_PIPELINES

CLIP_LENGTH = 77


def sd3_regions(
    tokenizer: Any, tokenizer_2: Any, tokenizer_3: Any = None, *, clip_length: int = CLIP_LENGTH, t5_length: int = 256
) -> list[TextRegion]:
    """Stable Diffusion 3 and 3.5: "clip_l" and "clip_g" at the same positions, then "t5"; None omits an encoder."""
    regions = [
        TextRegion("clip_l", tokenizer, clip_length) if tokenizer is not None else None,
        TextRegion("clip_g", tokenizer_2, clip_length) if tokenizer_2 is not None else None,
        TextRegion("t5", tokenizer_3, t5_length, start=clip_length) if tokenizer_3 is not None else None,
    ]
    return [region for region in regions if region]


def flux_regions(tokenizer_2: Any, *, length: int = 512) -> list[TextRegion]:
    """FLUX.1: the region "t5"."""
    return [TextRegion("t5", tokenizer_2, length)]


def flux2_regions(processor: Any, *, system_message: str, length: int = 512) -> list[TextRegion]:
    """FLUX.2: the region "mistral", from the pipeline's processor (or tokenizer) and its system message."""

    def render(prompt: str) -> str:
        text = [{"type": "text", "text": prompt}]
        system = {"role": "system", "content": [{"type": "text", "text": system_message}]}
        chat = [system, {"role": "user", "content": text}]
        return str(processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=False))

    is_processor = getattr(processor, "tokenizer", None) is not None
    tokenizer = processor.tokenizer if is_processor else processor
    template = template_parts(render)
    bos = getattr(tokenizer, "bos_token", None)
    has_bos = bos is not None and template["prefix"].startswith(bos)
    # A processor adds special tokens unless the chat begins with them; a tokenizer does not.
    special_tokens = is_processor and not has_bos
    return [TextRegion("mistral", tokenizer, length, **template, special_tokens=special_tokens, reserved=("[IMG]",))]


def flux2_klein_regions(tokenizer: Any, *, length: int = 512) -> list[TextRegion]:
    """FLUX.2 [klein]: the region "qwen3"."""

    def render(prompt: str) -> str:
        chat = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "enable_thinking": False}
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))

    return [TextRegion("qwen3", tokenizer, length, **template_parts(render))]


def qwen_image_regions(tokenizer: Any, *, template: str, dropped: int, length: int = 512) -> list[TextRegion]:
    """Qwen-Image: the region "qwen2", from the pipeline's prompt template and its number of dropped tokens."""
    parts = template_parts(template.format)
    return [TextRegion("qwen2", tokenizer, length, **parts, dropped=dropped, padded=False)]


def regions_of(
    pipeline: Any,
    *,
    max_sequence_length: int | None = None,
    encoders: Sequence[str] | None = None,
    images: Sequence[Any] | None = None,
) -> list[TextRegion]:
    """The text regions of a diffusers pipeline.

    Args:
        pipeline: a pipeline of a family in the table above or a text-to-video pipeline of Wan, LTX, LTX-2 or
            HunyuanVideo, or one of their variants that encode the prompt in the same way. Its tokenizers and templates
            are read; no model runs. Templates and instructions are the pipeline's own and its defaults: a
            ``system_prompt`` of Lumina 2 or a ``complex_human_instruction`` of Sana in the call moves the prompt.
        max_sequence_length: the ``max_sequence_length`` that the pipeline is called with; its default if None.
        encoders: names of the regions to return, such as ["t5"]; all if None.
        images: the reference images that Qwen-Image-Edit or -Plus is called with, or (width, height) of each: their
            tokens precede the prompt in the text. None for other pipelines.

    Raises:
        TypeError: unsupported pipeline, or a tokenizer that is not a fast tokenizer.
        ValueError: a length below 1, an encoder that the pipeline does not have, or the wrong number of images.
    """
    names = [cls.__name__ for cls in type(pipeline).__mro__]
    if isinstance(pipeline, nn.Module):
        raise TypeError(f"pipeline must be a diffusers pipeline, which has the tokenizers, got the model {names[0]}")
    refused = next((f"{name} is not supported: {_REFUSED[name]}" for name in names if name in _REFUSED), None)
    if refused is not None:
        raise TypeError(refused)
    edit = next((reader for name in names for family, reader in _EDITS if name in family), None)
    read = next((reader for name in names for family, reader in _FAMILIES if name in family), None)
    if edit is not None:
        regions = edit(pipeline, images)
    elif images is not None:
        raise ValueError(f"images must be None for {names[0]}, whose text has no reference images, got {images!r}")
    elif read is not None:
        regions = read(pipeline, max_sequence_length)
    else:
        raise TypeError(
            f"pipeline must be one of {', '.join(_KNOWN)} or their variants, got {names[0]}; describe others by "
            "TextRegions"
        )
    if encoders is None:
        return regions
    present = [region.name for region in regions]
    if isinstance(encoders, str) or not encoders or not set(encoders) <= set(present):
        raise ValueError(f"encoders must be a list of some of {', '.join(present)}, got {encoders!r}")
    return [region for region in regions if region.name in encoders]


def _read_sd3(pipeline: Any, length: int | None) -> list[TextRegion]:
    # Without the T5 encoder its positions are zeros, even if there is a tokenizer.
    t5 = pipeline.tokenizer_3 if pipeline.text_encoder_3 is not None else None
    clip_length = pipeline.tokenizer_max_length
    t5_length = 256 if length is None else length
    return sd3_regions(pipeline.tokenizer, pipeline.tokenizer_2, t5, clip_length=clip_length, t5_length=t5_length)


def _read_flux(pipeline: Any, length: int | None) -> list[TextRegion]:
    return flux_regions(pipeline.tokenizer_2, length=512 if length is None else length)


def _read_flux2(pipeline: Any, length: int | None) -> list[TextRegion]:
    length = 512 if length is None else length
    return flux2_regions(pipeline.tokenizer, system_message=pipeline.system_message, length=length)


def _read_flux2_klein(pipeline: Any, length: int | None) -> list[TextRegion]:
    return flux2_klein_regions(pipeline.tokenizer, length=512 if length is None else length)


def _read_qwen_image(pipeline: Any, length: int | None) -> list[TextRegion]:
    return qwen_image_regions(
        pipeline.tokenizer,
        template=pipeline.prompt_template_encode,
        dropped=pipeline.prompt_template_encode_start_idx,
        length=min(512 if length is None else length, pipeline.tokenizer_max_length),
    )


_Reader = Callable[[Any, int | None], list[TextRegion]]
_EditReader = Callable[[Any, Sequence[Any] | None], list[TextRegion]]
_SD3 = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpainting", "PAG", "PAGImg2Img")
_Z_IMAGE = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint")
_FLUX = (
    *("", "Img2Img", "Inpaint", "Fill", "Kontext", "KontextInpaint"),
    *("Control", "ControlImg2Img", "ControlInpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint"),
)
_FAMILIES: list[tuple[set[str], _Reader]] = [
    ({f"StableDiffusion3{variant}Pipeline" for variant in _SD3}, _read_sd3),
    ({f"Flux{variant}Pipeline" for variant in _FLUX}, _read_flux),
    ({"Flux2Pipeline"}, _read_flux2),
    ({f"Flux2Klein{variant}Pipeline" for variant in ("", "KV", "Inpaint")}, _read_flux2_klein),
    (
        {f"QwenImage{variant}Pipeline" for variant in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint")},
        _read_qwen_image,
    ),
    ({f"ZImage{variant}Pipeline" for variant in _Z_IMAGE}, pipelines.read_z_image),
    ({"Flux3ModularPipeline", "Flux3DistilledModularPipeline"}, pipelines.read_flux3),
    ({"OvisImagePipeline"}, pipelines.read_ovis),
    ({"Krea2Pipeline"}, pipelines.read_krea2),
    ({"HunyuanImagePipeline"}, pipelines.read_hunyuan_image),
    ({"Lumina2Pipeline"}, pipelines.read_lumina2),
    ({f"Sana{variant}Pipeline" for variant in ("", "ControlNet", "Sprint", "SprintImg2Img")}, pipelines.read_sana),
    ({"AuraFlowPipeline"}, pipelines.read_aura_flow),
    ({f"Chroma{variant}Pipeline" for variant in ("", "Img2Img", "Inpaint")}, pipelines.read_chroma),
    ({"HiDreamImagePipeline"}, pipelines.read_hidream),
    *VIDEO_PIPELINES,
]
_KNOWN = (
    *("StableDiffusion3Pipeline", "FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "Flux3ModularPipeline"),
    *("ChromaPipeline", "QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "Krea2Pipeline"),
    *("ZImagePipeline", "HunyuanImagePipeline", "HiDreamImagePipeline", "AuraFlowPipeline", "Lumina2Pipeline"),
    *("SanaPipeline", "OvisImagePipeline"),
    *("WanPipeline", "LTXPipeline", "LTX2Pipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline"),
)
_EDITS: list[tuple[set[str], _EditReader]] = [
    ({"QwenImageEditPipeline", "QwenImageEditInpaintPipeline"}, pipelines.read_qwen_image_edit),
    ({"QwenImageEditPlusPipeline"}, pipelines.read_qwen_image_edit_plus),
]
_REFUSED = {
    "ZImageOmniPipeline": "its text is in several parts, between the tokens of reference images",
    "QwenImageLayeredPipeline": "its images have several layers, and maps one grid",
    "HunyuanImageRefinerPipeline": "its latents have frames, and maps one grid",
    "LongCatImagePipeline": "it encodes quoted text one character at a time",
    "LongCatImageEditPipeline": "it encodes quoted text one character at a time",
    "GlmImagePipeline": "its text encoder reads only the quoted text; the prompt is read by a model of image tokens",
}
