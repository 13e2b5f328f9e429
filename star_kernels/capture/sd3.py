"""SD3 and SD3.5: joint attention over [image, text].

The second attention module of SD3.5 (``attn2``) attends from image to image only and is not captured.

``blocks="default"`` is block 9, counted from zero, of the 24 blocks of SD3-Medium and SD3.5-Medium. Seg4Diff (arXiv
2509.18096) segments images by the attention of single blocks and finds this one to be the best, in SD3-Medium (section
3.4 and Figure 8; ``ATTENTION_LAYERS: [9]`` in the configurations of its code is an index of ``transformer_blocks``) and
in SD3.5-Medium (appendix C). No block is published for SD3.5-Large (38 blocks) and for other depths: their default is
all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from star_kernels.capture.family import Family, ImageTokens


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in model.transformer_blocks]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    height, width = arguments["hidden_states"].shape[-2:]
    grid = height // model.config.patch_size, width // model.config.patch_size
    tokens = grid[0] * grid[1]
    text = arguments["encoder_hidden_states"].shape[1]
    return ImageTokens(rows=(0, tokens), grid=grid, text=(tokens, text), keys=tokens + text)


def default_blocks(model: Any) -> str | Sequence[int]:
    return (9,) if len(model.transformer_blocks) == 24 else "all"


# Of an image prompt adapter the first call is the one with the text.
_PROCESSORS = ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0", "SD3IPAdapterJointAttnProcessor2_0")
FAMILY = Family(attentions, image, processors=_PROCESSORS, default_blocks=default_blocks, cfg="last", call=0)
