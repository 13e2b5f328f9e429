"""Qwen-Image: joint attention over [text, image], with padding of the text masked out.

Guidance runs two forward passes there: capture with ``enabled = False`` for the unconditional one.
Reference images of the editing models follow the image and are cut.
"""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Family, ImageTokens


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in model.transformer_blocks]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    shape = arguments["img_shapes"][0]  # (frames, rows, columns), or a list with one such for each image
    frames, rows, columns = shape[0] if isinstance(shape[0], (list, tuple)) else shape
    if frames != 1:
        raise ValueError(f"img_shapes must be of images, one frame each, got {frames} frames")
    text = arguments["encoder_hidden_states"].shape[1]
    return ImageTokens(rows=(text, rows * columns), grid=(rows, columns), text=(0, text))


FAMILY = Family(attentions, image, processors=("QwenDoubleStreamAttnProcessor2_0",))
