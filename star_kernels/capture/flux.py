"""FLUX.1 and FLUX.2: joint attention over [text, image], in double- and in single-stream blocks.

Blocks count through both kinds, double ones first. Queries and keys carry their rotary embedding before the call. The
latent comes as a sequence, so its grid is read from ``img_ids`` when maps are read, with a wait for the device: once
for each tensor of ids until it is written to (PyTorch counts that), and for each pass under ``torch.inference_mode``,
where nothing counts it; ``grid=(rows, columns)`` avoids it. Reference images follow the image and are cut.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from star_kernels.capture.family import Family, Grid, ImageTokens


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    text, tokens = arguments["encoder_hidden_states"].shape[1], arguments["hidden_states"].shape[1]
    return ImageTokens(rows=(text, tokens), grid=_grid_of(arguments["img_ids"]), text=(0, text))


class _IdsGrid:
    """The grid of ids [queries, (image, row, column, ...)], in row-major order, as they are in a pass."""

    def __init__(self, ids: Tensor, version: int | None) -> None:
        self.ids = ids.detach().clone()  # they may be written to before maps are read
        self.version = version
        self.grid: Grid | None = None

    def __call__(self, queries: int) -> Grid:
        if self.grid is None:
            ours = self.ids[0] if self.ids.ndim == 3 else self.ids
            same_image = ours[:, 0] == ours[0, 0]
            tokens, columns = int(same_image.sum()), int((same_image & (ours[:, 1] == ours[0, 1])).sum())
            self.grid = tokens // columns, columns
        return self.grid


_seen = WeakIdKeyDictionary()  # the latest _IdsGrid of a tensor of ids


def _grid_of(ids: Tensor) -> _IdsGrid:
    version = None if ids.is_inference() else ids._version
    seen: _IdsGrid | None = _seen.get(ids)
    if seen is None or version is None or seen.version != version:
        seen = _seen[ids] = _IdsGrid(ids, version)
    return seen


_PROCESSORS = ("FluxAttnProcessor", "FusedFluxAttnProcessor2_0")
FLUX = Family(attentions, image, processors=_PROCESSORS)
_PROCESSORS_2 = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
FLUX2 = Family(attentions, image, processors=_PROCESSORS_2)
