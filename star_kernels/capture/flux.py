"""FLUX.1 and FLUX.2: joint attention over [text, image], in double- and in single-stream blocks.

Blocks count through both kinds, double ones first. Queries and keys carry their rotary embedding before the call. The
latent comes as a sequence, so its grid is read from ``img_ids`` when maps are read: once for each tensor of ids, with
a wait for the device; ``grid=(rows, columns)`` avoids it. Reference images follow the image and are cut.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from star_kernels.capture.family import Family, Grid, ImageTokens

_grids = WeakIdKeyDictionary()  # of the ids seen


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    text, tokens = arguments["encoder_hidden_states"].shape[1], arguments["hidden_states"].shape[1]
    return ImageTokens(rows=(text, tokens), grid=partial(_grid, arguments["img_ids"]))


def _grid(ids: Tensor, queries: int) -> Grid:
    """From ids [queries, (image, row, column, ...)], in row-major order."""
    if ids not in _grids:
        ours = ids[0] if ids.ndim == 3 else ids
        same_image = ours[:, 0] == ours[0, 0]
        tokens, columns = int(same_image.sum()), int((same_image & (ours[:, 1] == ours[0, 1])).sum())
        _grids[ids] = tokens // columns, columns
    grid: Grid = _grids[ids]
    return grid


_PROCESSORS = ("FluxAttnProcessor", "FusedFluxAttnProcessor2_0")
FLUX = Family(attentions, image, processors=_PROCESSORS)
_PROCESSORS_2 = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
FLUX2 = Family(attentions, image, processors=_PROCESSORS_2)
