"""SD3 and SD3.5: joint attention over [image, text].

The second attention module of SD3.5 (``attn2``) attends from image to image only and is not captured.
"""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Family, ImageTokens


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in model.transformer_blocks]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    height, width = arguments["hidden_states"].shape[-2:]
    grid = height // model.config.patch_size, width // model.config.patch_size
    tokens = grid[0] * grid[1]
    return ImageTokens(rows=(0, tokens), grid=grid, text=(tokens, arguments["encoder_hidden_states"].shape[1]))


FAMILY = Family(attentions, image, processors=("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"), cfg="last")
