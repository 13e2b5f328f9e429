"""Cross-attention: the UNets of SD 1, SD 2 and SDXL, PixArt and Sana. Keys are the text tokens, queries the image.

A UNet attends at several resolutions, each half of the one before, rounded up.

``blocks="default"`` is all blocks: DAAM (arXiv 2210.04885) averages the maps of all blocks of a UNet. No publication
names the blocks of PixArt and Sana that find the words best.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from star_kernels.capture.family import Family, Grid, ImageTokens

_PROCESSORS = ("AttnProcessor2_0", "FusedAttnProcessor2_0")
_PROMPTED = ("IPAdapterAttnProcessor2_0",)  # with image prompts: the first call is the one with the text


def unet_attentions(model: Any) -> list[Any]:
    parts = [*model.down_blocks, model.mid_block, *model.up_blocks]
    modules = [named for part in parts if part is not None for named in part.named_modules()]
    return [module for name, module in modules if name.endswith("attn2")]


def unet_image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    grid = partial(_at_resolution, tuple(arguments["sample"].shape[-2:]))
    text = _text(arguments)
    return ImageTokens(rows=None, grid=grid, text=text, keys=text and text[1])


def _at_resolution(latent: Grid, queries: int) -> Grid:
    rows, columns = latent
    while rows * columns > queries:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != queries:
        raise ValueError(f"a UNet with a latent of {latent[0]} x {latent[1]} has no resolution of {queries} positions")
    return rows, columns


def pixart_attentions(model: Any) -> list[Any]:
    return [block.attn2 for block in model.transformer_blocks]


def pixart_image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    rows, columns = arguments["hidden_states"].shape[-2:]
    grid = rows // model.config.patch_size, columns // model.config.patch_size
    text = _text(arguments)
    return ImageTokens(rows=None, grid=grid, text=text, keys=text and text[1])


def _text(arguments: dict[str, Any]) -> tuple[int, int] | None:
    text = arguments.get("encoder_hidden_states")
    return None if text is None else (0, text.shape[1])


UNET = Family(unet_attentions, unet_image, processors=_PROCESSORS + _PROMPTED, cfg="last", call=0)
PIXART = Family(pixart_attentions, pixart_image, processors=_PROCESSORS, cfg="last")
SANA = Family(pixart_attentions, pixart_image, processors=("SanaAttnProcessor2_0",), cfg="last")
