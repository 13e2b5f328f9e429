"""Lumina 2: joint attention over [text, image], without the padding of the text, which is moved to the end.

The image of a sample starts after its own text, so its rows differ between samples with prompts of different length.
Their lengths are sums of ``encoder_attention_mask``; the model reads them in each pass too, which waits for the device.

The attention of the refiners is not captured. Guidance runs separate forward passes: set ``enabled = False`` on the
capture for the unconditional one. No publication names the blocks that find the words best: the default is all blocks.
"""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Family, ImageTokens
from star_kernels.capture.patches import patch_grid


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in model.layers]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    rows, columns = patch_grid(arguments["hidden_states"], model.config.patch_size)
    lengths = tuple(int(length) for length in arguments["encoder_attention_mask"].sum(dim=1).tolist())
    first, last = min(lengths), max(lengths)
    span = (first, last - first + rows * columns)
    own = lengths if first < last else None
    return ImageTokens(rows=span, grid=(rows, columns), text=(0, last), lengths=own)


FAMILY = Family(attentions, image, processors=("Lumina2AttnProcessor2_0",))
