"""HunyuanImage 2.1: joint attention over [image, text], in double- and in single-stream blocks.

The text is ``encoder_hidden_states``. With a second encoder, of quoted text (glyphs), the model joins the two and moves
padding to the end: the glyph tokens of a sample, its other tokens, then padding. Positions are those in the joined
text: the glyph tokens of a prompt move its other tokens. ``regions_of`` takes them into account.

Block indices count double-stream blocks first, then single-stream blocks. Guidance runs separate forward passes: set
``enabled = False`` on the capture for the unconditional one. Latents of the refiner, which have frames, are an error.
No publication names the blocks that find the words best: the default is all blocks.
"""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Family, ImageTokens
from star_kernels.capture.patches import patch_grid


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    rows, columns = patch_grid(arguments["hidden_states"], model.config.patch_size)
    text = arguments["encoder_hidden_states"].shape[1]
    glyphs = arguments.get("encoder_hidden_states_2")
    if glyphs is not None and model.context_embedder_2 is not None:
        text += glyphs.shape[1]
    return ImageTokens(rows=(0, rows * columns), grid=(rows, columns), text=(rows * columns, text))


FAMILY = Family(attentions, image, processors=("HunyuanImageAttnProcessor",))
