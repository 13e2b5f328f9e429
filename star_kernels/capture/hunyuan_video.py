"""HunyuanVideo and HunyuanVideo-1.5: joint attention over [video, text], with padding of the text masked.

Block indices count double-stream blocks first, then single-stream blocks, which HunyuanVideo-1.5 does not have.
Guidance with a negative prompt runs two forward passes in each step, the conditional one first: set ``enabled = False``
on the capture for the other.

The keys of HunyuanVideo-1.5 after the video are, without their padding: tokens of a conditioning image, of the text in
quotation marks (ByT5), and of the prompt, which is the text here. So the start of the text depends on the values of
masks, which are read in every captured pass; that waits for the device.

No publication names the blocks that find the words best, so ``blocks="default"`` is all blocks.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from star_kernels.capture.family import Family, ImageTokens


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in (*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ()))]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    grid = _grid(model, arguments)
    tokens, text = prod(grid), arguments["encoder_hidden_states"].shape[1]
    return ImageTokens(rows=(0, tokens), grid=grid, text=(tokens, text), keys=tokens + text)


def image_15(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    grid = _grid(model, arguments)
    quoted, picture = arguments["encoder_hidden_states_2"], arguments["image_embeds"]
    before = _before_text(arguments["encoder_attention_mask_2"], picture)
    tokens, text = prod(grid), arguments["encoder_hidden_states"].shape[1]
    keys = tokens + text + quoted.shape[1] + picture.shape[1]
    return ImageTokens(rows=(0, tokens), grid=grid, text=(tokens + before, text), keys=keys)


def _grid(model: Any, arguments: dict[str, Any]) -> tuple[int, int, int]:
    frames, rows, columns = arguments["hidden_states"].shape[-3:]
    patch = model.config.patch_size
    return frames // model.config.patch_size_t, rows // patch, columns // patch


def _before_text(quoted_mask: Tensor, picture: Tensor) -> int:
    """The number of keys between the video and the prompt."""
    counts = quoted_mask.bool().sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(
            "all samples of a batch must have the same number of tokens of text in quotation marks while maps are "
            f"captured, because the prompt's tokens follow them, got {counts}"
        )
    return int(counts[0]) + (picture.shape[1] if bool(picture.any()) else 0)


FAMILY = Family(attentions, image, processors=("HunyuanVideoAttnProcessor2_0",))
FAMILY_15 = Family(attentions, image_15, processors=("HunyuanVideo15AttnProcessor2_0",))
