"""Readers of diffusers pipelines of recent image models: their tokenizers, templates and defaults, as TextRegions."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from star_kernels.prompts.templates import template_parts
from star_kernels.prompts.tokens import TextRegion

UNTRUNCATED = 1 << 20  # tokens: more than any prompt has


def _chat(tokenizer: Any, begin: str = "", **options: Any) -> dict[str, Any]:
    """The template of a chat with one message, ``begin`` and the prompt."""

    def render(prompt: str) -> str:
        chat = [{"role": "user", "content": begin + prompt}]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options))

    return template_parts(render)


def _right(region: TextRegion, why: str) -> TextRegion:
    """The region, unless its tokenizer pads on the left."""
    if getattr(region.tokenizer, "padding_side", "right") == "left":
        raise ValueError(f"tokenizer must pad on the right, got padding_side='left': {why}")
    return region


def read_z_image(pipeline: Any, length: int | None) -> list[TextRegion]:
    parts = _chat(pipeline.tokenizer, enable_thinking=True)
    return [TextRegion("qwen3", pipeline.tokenizer, 512 if length is None else length, **parts, padded=False)]


def read_flux3(pipeline: Any, length: int | None) -> list[TextRegion]:
    parts = _chat(pipeline.tokenizer)
    return [
        TextRegion("qwen3_vl", pipeline.tokenizer.tokenizer, 8192 if length is None else length, **parts, padded=False)
    ]


def read_ovis(pipeline: Any, length: int | None) -> list[TextRegion]:
    parts = _chat(pipeline.tokenizer, begin=pipeline.system_prompt, enable_thinking=False)
    dropped, length = pipeline.user_prompt_begin_id, 256 if length is None else length
    return [TextRegion("qwen3", pipeline.tokenizer, length, **parts, dropped=dropped, special_tokens=False)]


def read_krea2(pipeline: Any, length: int | None) -> list[TextRegion]:
    # The end of the template follows the padding.
    region = TextRegion(
        "qwen3_vl",
        pipeline.tokenizer,
        (512 if length is None else length) - pipeline.prompt_template_encode_num_suffix_tokens,
        prefix=pipeline.prompt_template_encode_prefix,
        dropped=pipeline.prompt_template_encode_start_idx,
    )
    return [region]


def read_hunyuan_image(pipeline: Any, length: int | None) -> list[TextRegion]:
    region = TextRegion(
        "qwen2",
        pipeline.tokenizer,
        pipeline.tokenizer_max_length if length is None else length,
        **template_parts(pipeline.prompt_template_encode.format),
        dropped=pipeline.prompt_template_encode_start_idx,
        leading=_glyph_tokens(pipeline),
    )
    return [_right(region, "the first tokens of the text encoder's output are dropped, which must be the template's")]


def _glyph_tokens(pipeline: Any) -> Callable[[str], int] | None:
    """The number of tokens of a prompt's quoted text, which the model moves before the other tokens."""
    if pipeline.transformer is not None and pipeline.transformer.config.text_embed_2_dim is None:
        return None
    defining = next(cls for cls in type(pipeline).__mro__ if cls.__name__ == "HunyuanImagePipeline")
    extract = sys.modules[defining.__module__].extract_glyph_text

    def count(prompt: str) -> int:
        text = extract(prompt)
        if text is None:
            return 0
        return len(pipeline.tokenizer_2(text, truncation=True, max_length=pipeline.tokenizer_2_max_length)["input_ids"])

    return count


def read_lumina2(pipeline: Any, length: int | None) -> list[TextRegion]:
    prefix = pipeline.system_prompt + " <Prompt Start> "
    region = TextRegion("gemma2", pipeline.tokenizer, 256 if length is None else length, prefix=prefix)
    return [_right(region, "the model takes as many of the first tokens as the prompt has")]


def read_sana(pipeline: Any, length: int | None) -> list[TextRegion]:
    default = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    return [sana_region(pipeline.tokenizer, instruction=default, length=300 if length is None else length)]


def sana_region(tokenizer: Any, *, instruction: Sequence[str] | None, length: int = 300) -> TextRegion:
    """Sana: the region "gemma2", for the ``complex_human_instruction`` that the pipeline is called with.

    Of the encoder's output the pipeline keeps the first position and the last ``length - 1``.
    """
    prefix = "\n".join(instruction or ())
    dropped = len(tokenizer.encode(prefix)) - 2 if prefix else 0
    return TextRegion(
        "gemma2",
        tokenizer,
        length,
        prefix=prefix,
        dropped=dropped,
        cleans=lambda prompt: prompt.lower().strip(),
        keeps_first=dropped > 0,
        right=True,  # the pipeline sets the tokenizer's padding side in each call
    )


def read_aura_flow(pipeline: Any, length: int | None) -> list[TextRegion]:
    return [TextRegion("t5", pipeline.tokenizer, 256 if length is None else length)]


def read_chroma(pipeline: Any, length: int | None) -> list[TextRegion]:
    return [TextRegion("t5", pipeline.tokenizer, 512 if length is None else length)]


def read_hidream(pipeline: Any, length: int | None) -> list[TextRegion]:
    """T5, then the last layer of Llama, then the layer of Llama that belongs to the block."""
    t5, llama = pipeline.tokenizer_3, pipeline.tokenizer_4
    lengths = [min(128 if length is None else length, tokenizer.model_max_length) for tokenizer in (t5, llama)]
    return [
        TextRegion("t5", t5, lengths[0]),
        TextRegion("llama3", llama, lengths[1], start=lengths[0]),
        TextRegion("llama3_block", llama, lengths[1], start=sum(lengths)),
    ]


def read_qwen_image_edit(pipeline: Any, images: Sequence[Any] | None) -> list[TextRegion]:
    """Qwen-Image-Edit: one reference image, whose tokens precede the prompt in the template."""
    sizes = _sizes(images)
    if len(sizes) != 1:
        raise ValueError(f"images must be a list of one reference image, that of the pipeline's call, got {images!r}")
    return [_edit_region(pipeline, pipeline.prompt_template_encode, sizes, area=1024 * 1024)]


def read_qwen_image_edit_plus(pipeline: Any, images: Sequence[Any] | None) -> list[TextRegion]:
    """Qwen-Image-Edit-Plus: any number of reference images, with a line for each before the prompt."""
    sizes = _sizes(images)
    before = "".join(f"Picture {i + 1}: <|vision_start|><|image_pad|><|vision_end|>" for i in range(len(sizes)))
    text = pipeline.prompt_template_encode.replace("{}", before + "{}")
    return [_edit_region(pipeline, text, sizes, area=384 * 384)]


def _edit_region(pipeline: Any, text: str, sizes: list[tuple[int, int]], *, area: int) -> TextRegion:
    """The region of a template with a placeholder for each image, which the processor repeats for each token of it."""
    from PIL import Image

    processor = pipeline.processor
    placeholder = getattr(processor, "image_token", "<|image_pad|>")
    parts = template_parts(text.format)
    pieces = parts["prefix"].split(placeholder)
    counts = []
    if sizes:
        blank = [Image.new("RGB", _scaled(size, area)) for size in sizes]
        grids = processor.image_processor(images=blank, return_tensors="pt")["image_grid_thw"]
        counts = [int(n) // processor.image_processor.merge_size**2 for n in grids.prod(dim=-1)]
    if len(pieces) != len(counts) + 1:
        raise ValueError(
            f"the prompt template must have {len(counts)} image placeholders before the prompt, got {len(pieces) - 1}"
        )
    repeated = zip(pieces, [placeholder * n for n in counts] + [""], strict=True)
    parts["prefix"] = "".join(piece + tokens for piece, tokens in repeated)
    dropped = pipeline.prompt_template_encode_start_idx
    return TextRegion(
        "qwen2", processor.tokenizer, UNTRUNCATED, **parts, dropped=dropped, padded=False, reserved=(placeholder,)
    )


def _sizes(images: Sequence[Any] | None) -> list[tuple[int, int]]:
    """(width, height) of each reference image."""
    found = [getattr(image, "size", image) for image in images or ()]
    for size in found:
        if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f"images must be a list of PIL images or of pairs (width, height), got {size!r} in it")
    return [(size[0], size[1]) for size in found]


def _scaled(size: tuple[int, int], area: int) -> tuple[int, int]:
    """The size to which the pipelines scale a reference image: about ``area`` pixels, in multiples of 32."""
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    return round(width / 32) * 32, round(width / ratio / 32) * 32
