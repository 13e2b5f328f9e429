"""LTX-Video and LTX-2: cross-attention of the video tokens to the text, in every block.

Keys are the text tokens. In LTX-2 they are those after the text connectors: the tokens of the prompt first, then
learned registers. Its audio stream has attention of its own, which is not captured.

LTX-2 pipelines run further passes in a step, for guidance by skipped attention (``spatio_temporal_guidance_blocks``)
and without audio (``isolate_modalities``). These passes are not captured: the maps of the pass before remain.

Tokens of references and keyframes that LTX-2 pipelines append to the video are dropped. LTXConditionPipeline puts
tokens before the video and does not pass its size: capture it with ``rows`` and ``grid``.

No publication names the blocks that find the words best, so ``blocks="default"`` is all blocks.
"""

from __future__ import annotations

from math import prod
from typing import Any, NoReturn

from star_kernels.capture.family import Family, ImageTokens


def attentions(model: Any) -> list[Any]:
    return [block.attn2 for block in model.transformer_blocks]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens | None:
    if arguments.get("spatio_temporal_guidance_blocks") or arguments.get("isolate_modalities"):
        return None
    tokens, text = arguments["hidden_states"].shape[1], arguments["encoder_hidden_states"].shape[1]
    grid: tuple[Any, ...] = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))  # of tokens
    if None in grid:
        return ImageTokens(rows=None, grid=_unknown, text=(0, text), keys=text)
    if prod(grid) > tokens:
        raise ValueError(
            f"hidden_states must have at least the {prod(grid)} tokens of num_frames, height and width, got {tokens}"
        )
    return ImageTokens(rows=(0, prod(grid)), grid=grid, text=(0, text), keys=text)


def _unknown(queries: int) -> NoReturn:
    raise ValueError(
        "the transformer was called without num_frames, height and width, as LTXConditionPipeline does: capture with "
        "rows=(start, length) and grid=(frames, rows, columns) of the video tokens"
    )


LTX = Family(attentions, image, processors=("LTXVideoAttnProcessor",), cfg="last")
LTX2 = Family(attentions, image, processors=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"), cfg="last")
