"""Krea 2: joint attention over [text, image], with padding of the text masked.

The attention of the text fusion blocks is not captured. The latent is a sequence, so its grid is derived from the
values of ``position_ids`` when maps are read, as in FLUX. Guidance runs separate forward passes: set ``enabled =
False`` on the capture for the unconditional one. No publication names the blocks that find the words best: the default
is all blocks.
"""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Family, ImageTokens
from star_kernels.capture.flux import grid_of_ids


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in model.transformer_blocks]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    text, tokens = arguments["encoder_hidden_states"].shape[1], arguments["hidden_states"].shape[1]
    grid = grid_of_ids(arguments["position_ids"], start=text)
    return ImageTokens(rows=(text, tokens), grid=grid, text=(0, text))


FAMILY = Family(attentions, image, processors=("Krea2AttnProcessor",))
