"""Wan 2.1 and 2.2: cross-attention of the video tokens to the text, in every block.

Guidance runs two forward passes in each step, the conditional one first: set ``enabled = False`` on the capture for the
other. Wan 2.2 with two models (``transformer`` and ``transformer_2``) needs a capture of each.

Image-to-video models of Wan 2.1 also attend to the tokens of an image, in a call before that of the text. Their
processor takes the last 512 keys as the text.

No publication names the blocks that find the words best, so ``blocks="default"`` is all blocks.
"""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Family, ImageTokens

_TEXT = 512  # the length of the text in models with image keys, as in their attention processor


def attentions(model: Any) -> list[Any]:
    return [block.attn2 for block in model.blocks]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    sizes = arguments["hidden_states"].shape[-3:]
    grid = tuple(size // patch for size, patch in zip(sizes, model.config.patch_size, strict=True))
    text = arguments["encoder_hidden_states"].shape[1]
    if _has_image_keys(model.blocks[0].attn2) and text != _TEXT:
        raise ValueError(
            f"encoder_hidden_states must have {_TEXT} tokens in a Wan model with image keys, whose attention processor "
            f"takes the last {_TEXT} keys as the text, got {text}"
        )
    return ImageTokens(rows=None, grid=grid, text=(0, text), keys=text)


def call(attention: Any) -> int:
    """The attention call of the text: the second if the module attends to an image too."""
    return int(_has_image_keys(attention))


def _has_image_keys(attention: Any) -> bool:
    return attention.add_k_proj is not None


FAMILY = Family(attentions, image, processors=("WanAttnProcessor",), call=call)
