"""The positions of the text encoders' tokens in diffusers' video pipelines, according to diffusers 0.42.

================  ===============  ====================================================================================
family            keys             text
================  ===============  ====================================================================================
Wan 2.1, Wan 2.2  text             UMT5 (512) of the cleaned prompt; padding is zeros and not masked
LTX-Video         text             T5 (128, LTXConditionPipeline 256)
LTX-2             text             Gemma (1024), padded on the left; connectors then move its tokens to the front
HunyuanVideo      video, text      Llama: a template without its first 95 tokens, padded to 256
HunyuanVideo-1.5  video, text      Qwen2.5-VL: a chat without its first 108 tokens, at most 1000; without its padding
================  ===============  ====================================================================================
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from star_kernels.prompts.templates import template_parts
from star_kernels.prompts.tokens import TextRegion


def _length(pipeline: Any, length: int | None) -> int:
    """The given length, or the default of the pipeline's call."""
    if length is not None:
        return length
    return int(inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default)


def _read_wan(pipeline: Any, length: int | None) -> list[TextRegion]:
    modules = [sys.modules[cls.__module__] for cls in type(pipeline).__mro__]
    clean = next((vars(module)["prompt_clean"] for module in modules if "prompt_clean" in vars(module)), None)
    if clean is None:
        raise TypeError(f"the module of {type(pipeline).__name__} must have prompt_clean, as in diffusers 0.42")
    return [TextRegion("umt5", pipeline.tokenizer, _length(pipeline, length), cleans=clean)]


def _read_ltx(pipeline: Any, length: int | None) -> list[TextRegion]:
    return [TextRegion("t5", pipeline.tokenizer, _length(pipeline, length))]


def _read_ltx2(pipeline: Any, length: int | None) -> list[TextRegion]:
    if pipeline.connectors.video_connector.learnable_registers is None:
        raise ValueError(
            "pipeline.connectors must have learnable registers, which make the text start at the first position, got "
            "connectors without them"
        )
    return [TextRegion("gemma", pipeline.tokenizer, _length(pipeline, length), strips=True, padded=False)]


def _read_hunyuan_video(pipeline: Any, length: int | None) -> list[TextRegion]:
    template = inspect.signature(pipeline.encode_prompt).parameters["prompt_template"].default
    dropped = template.get("crop_start")
    if dropped is None:
        raise ValueError("the default prompt_template of the pipeline must have a number as crop_start, got None")
    parts = template_parts(template["template"].format)
    length = _length(pipeline, length)
    return [TextRegion("llama", pipeline.tokenizer, length, **parts, dropped=dropped)]


def _read_hunyuan_video15(pipeline: Any, length: int | None) -> list[TextRegion]:
    def render(prompt: str) -> str:
        chat = [{"role": "system", "content": pipeline.system_message}, {"role": "user", "content": prompt}]
        return str(pipeline.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    if getattr(pipeline.tokenizer, "padding_side", "right") != "right":
        raise ValueError(
            "pipeline.tokenizer must have padding_side 'right', so that the template is dropped, got 'left'"
        )
    region = TextRegion(
        "qwen2",
        pipeline.tokenizer,
        pipeline.tokenizer_max_length if length is None else length,
        **template_parts(render),
        dropped=pipeline.prompt_template_encode_start_idx,
        padded=False,
        special_tokens=False,
    )
    return [region]


VIDEO_PIPELINES: list[tuple[set[str], Callable[[Any, int | None], list[TextRegion]]]] = [
    ({"WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"}, _read_wan),
    ({"LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"}, _read_ltx),
    ({"LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"}, _read_ltx2),
    ({"HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"}, _read_hunyuan_video),
    ({"HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"}, _read_hunyuan_video15),
]
