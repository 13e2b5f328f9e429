"""AuraFlow: joint attention over [registers, text, image], in double- and in single-stream blocks.

The registers are learned tokens. Block indices count double-stream blocks first, then single-stream blocks. Padding of
the text is not masked. No publication names the blocks that find the words best: the default is all blocks.
"""

from __future__ import annotations

from typing import Any

from star_kernels.capture.family import Family, ImageTokens
from star_kernels.capture.patches import patch_grid


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in (*model.joint_transformer_blocks, *model.single_transformer_blocks)]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    rows, columns = patch_grid(arguments["hidden_states"], model.config.patch_size)
    registers, text = model.register_tokens.shape[1], arguments["encoder_hidden_states"].shape[1]
    return ImageTokens(rows=(registers + text, rows * columns), grid=(rows, columns), text=(registers, text))


_PROCESSORS = ("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0")
FAMILY = Family(attentions, image, processors=_PROCESSORS, cfg="last")
