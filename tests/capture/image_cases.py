"""The families of image models: their tiny models, the layout of their attention calls, and their pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tiny_image_models import (
    GLYPHS,
    LONG,
    PADDED,
    REFERENCES,
    REGISTERS,
    SHORT,
    Lengths,
    aura_flow,
    aura_flow_inputs,
    chroma,
    chroma_inputs,
    chroma_inputs_of_pipeline,
    flux3,
    flux3_inputs,
    hidream,
    hidream_inputs,
    hunyuan_image,
    hunyuan_image_inputs,
    krea2,
    krea2_inputs,
    longcat,
    longcat_inputs,
    lumina2,
    lumina2_inputs,
    ovis,
    qwen_image_edit_inputs,
    sana,
    sana_inputs,
    z_image,
    z_image_inputs,
)
from tiny_models import IMAGE, Case, qwen_image
from torch import nn

from star_kernels import TokenSelection


@dataclass(frozen=True)
class ImageCase:
    """One family.

    Args:
        build: the model.
        inputs: of a batch, given the length of the text of each sample.
        text: where the text starts in the keys.
        image: the first image query of each sample, given the lengths.
        keys: the number of keys of the captured calls, given the lengths.
        lengths: of the text of two prompts.
        cfg: which half of a doubled batch is conditional; None if guidance runs separate passes.
        latent: the name of the argument that is the latent.
        order: of the keys, for docs/models.md.
        pipelines: of diffusers, for docs/models.md.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[Lengths], dict[str, Any]]
    text: int
    image: Callable[[Lengths], Lengths]
    keys: Callable[[Lengths], int]
    lengths: tuple[int, int] = (LONG, SHORT)
    cfg: str | None = None
    latent: str = "hidden_states"
    order: str = ""
    pipelines: str = ""

    def model(self) -> Any:
        return Case(self.build, dict, (0, 0), 0).make()[0]

    def selection(self, images: int = 1) -> TokenSelection:
        """Of the text, for two prompts with a number of images each."""
        positions = [[[0], [1, 2]], [[3], []]]
        return TokenSelection.from_positions([p for p in positions for _ in range(images)])


def _same(value: int) -> Callable[[Lengths], Lengths]:
    return lambda lengths: [value] * len(lengths)


def _joint(extra: int = 0) -> Callable[[Lengths], int]:
    return lambda lengths: IMAGE + max(lengths) + extra


def _after_text(lengths: Lengths) -> Lengths:
    return [max(lengths)] * len(lengths)


def _z_image_keys(lengths: Lengths) -> int:
    longest = max(lengths)
    return PADDED + longest + -longest % 32


IMAGE_CASES = {
    "Z-Image": ImageCase(
        z_image,
        z_image_inputs,
        PADDED,
        _same(0),
        _z_image_keys,
        lengths=(40, SHORT),
        cfg="first",
        latent="x",
        order="image, text; each padded to a multiple of 32",
        pipelines="`ZImagePipeline`, Img2Img, Inpaint, ControlNet, ControlNetInpaint",
    ),
    "HunyuanImage 2.1": ImageCase(
        hunyuan_image,
        hunyuan_image_inputs,
        IMAGE,
        _same(0),
        _joint(GLYPHS),
        order="image, quoted text, text",
        pipelines="`HunyuanImagePipeline`",
    ),
    "FLUX.3": ImageCase(
        flux3,
        flux3_inputs,
        0,
        _after_text,
        _joint(REFERENCES),
        order="text, image, references",
        pipelines="`Flux3ModularPipeline`, Distilled",
    ),
    "Krea 2": ImageCase(
        krea2, krea2_inputs, 0, _after_text, _joint(), order="text, image", pipelines="`Krea2Pipeline`"
    ),
    "Qwen-Image-Edit": ImageCase(
        qwen_image,
        qwen_image_edit_inputs,
        0,
        _after_text,
        _joint(16),
        order="text, image, references",
        pipelines="`QwenImageEditPipeline`, EditInpaint, EditPlus",
    ),
    "Sana": ImageCase(
        sana,
        sana_inputs,
        0,
        _same(0),
        max,
        cfg="last",
        order="text (cross-attention)",
        pipelines="`SanaPipeline`, ControlNet, Sprint, SprintImg2Img",
    ),
    "Lumina 2": ImageCase(
        lumina2,
        lumina2_inputs,
        0,
        list,
        _joint(),
        order="text, image; the rows differ between samples",
        pipelines="`Lumina2Pipeline`",
    ),
    "Chroma": ImageCase(
        chroma,
        chroma_inputs_of_pipeline,
        0,
        _after_text,
        _joint(),
        order="text, image",
        pipelines="`ChromaPipeline`, Img2Img, Inpaint",
    ),
    "Ovis-Image": ImageCase(
        ovis, chroma_inputs, 0, _after_text, _joint(), order="text, image", pipelines="`OvisImagePipeline`"
    ),
    "LongCat-Image": ImageCase(
        longcat,
        longcat_inputs,
        0,
        _after_text,
        _joint(REFERENCES),
        order="text, image, references",
        pipelines="`LongCatImagePipeline`, Edit; not in `regions_of`",
    ),
    "AuraFlow": ImageCase(
        aura_flow,
        aura_flow_inputs,
        REGISTERS,
        lambda lengths: [REGISTERS + max(lengths)] * len(lengths),
        _joint(REGISTERS),
        cfg="last",
        order="registers, text, image",
        pipelines="`AuraFlowPipeline`",
    ),
    "HiDream-I1": ImageCase(
        hidream,
        hidream_inputs,
        PADDED,
        _same(0),
        lambda lengths: PADDED + 3 * max(lengths),
        cfg="last",
        order="image, T5, Llama, Llama's layer of the block",
        pipelines="`HiDreamImagePipeline`",
    ),
}
