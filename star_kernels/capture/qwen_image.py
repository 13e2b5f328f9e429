"""Qwen-Image: joint attention over [text, image], with padding of the text masked.

Guidance runs two forward passes: set ``enabled = False`` on the capture for the unconditional one.
Tokens of reference images (editing models) follow the image and are dropped.

No publication names the blocks that find the words best, so ``blocks="default"`` is all blocks.
"""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Family, ImageTokens


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in model.transformer_blocks]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    shape = arguments["img_shapes"][0]  # (frames, rows, columns), or a list of them, one for each image
    frames, rows, columns = shape[0] if isinstance(shape[0], (list, tuple)) else shape
    if frames != 1:
        raise ValueError(f"img_shapes must be shapes of images, with one frame each, got {frames} frames")
    text = arguments["encoder_hidden_states"].shape[1]
    keys = text + arguments["hidden_states"].shape[1]
    return ImageTokens(rows=(text, rows * columns), grid=(rows, columns), text=(0, text), keys=keys)


FAMILY = Family(attentions, image, processors=("QwenDoubleStreamAttnProcessor2_0",))
