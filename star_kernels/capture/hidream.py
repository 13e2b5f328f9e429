"""HiDream-I1: joint attention over [image, text], in double- and in single-stream blocks.

The text is that of T5, then the last layer of Llama, then the layer of Llama that belongs to the block: the tokens of
Llama occur twice. The tokens of an image that is not square are padded to the largest number of tokens; the padding is
not masked. Block indices count double-stream blocks first, then single-stream blocks. Images that are given as patches,
with ``hidden_states_masks``, are an error. No publication names the blocks that find the words best: the default is all
blocks.
"""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Family, ImageTokens
from star_kernels.capture.patches import patch_grid


def attentions(model: Any) -> list[Any]:
    return [block.block.attn1 for block in (*model.double_stream_blocks, *model.single_stream_blocks)]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    rows, columns = patch_grid(arguments["hidden_states"], model.config.patch_size)
    height, width = arguments["hidden_states"].shape[-2:]
    start = rows * columns if height == width else model.max_seq
    llama = arguments["encoder_hidden_states_llama3"][0].shape[1]
    text = arguments["encoder_hidden_states_t5"].shape[1] + 2 * llama
    return ImageTokens(rows=(0, rows * columns), grid=(rows, columns), text=(start, text))


FAMILY = Family(attentions, image, processors=("HiDreamAttnProcessor",), cfg="last")
