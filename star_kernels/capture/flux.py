"""FLUX.1, 2 and 3, Chroma, Ovis-Image and LongCat-Image: joint attention over [text, image], in double- and in
single-stream blocks.

In FLUX.3 only the single-stream blocks are joint and captured, and reference images are an argument of their own.
Guidance runs separate forward passes: set ``enabled = False`` on the capture for the unconditional one. The mask of
Chroma's pipelines differs by query, so their own attention computes the output.

Block indices count double-stream blocks first, then single-stream blocks. The rotary embedding is applied to queries
and keys before the attention call. The latent is a sequence, so its grid is derived from the values of ``img_ids`` when
maps are read, which waits for the device: once for each ``img_ids`` tensor until it is modified in place (detected by
its version counter), and in every pass under ``torch.inference_mode``, where tensors have no version counter.
``grid=(rows, columns)`` avoids the wait. Tokens of reference images follow the image and are dropped.

``blocks="default"`` is, for FLUX.1 (19 double- and 38 single-stream blocks), the double-stream blocks 10 to 18, counted
from zero, both included: those over which ConceptAttention (arXiv 2502.04320) averages the cross-attention maps that it
compares itself with (``range(10, 19)`` in its code). They include blocks 12 and 17, which Seg4Diff (arXiv 2509.18096,
appendix C) finds to be the best of FLUX.1-dev. No blocks are published for models of other depths and for the other
models: their default is all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from star_kernels.capture.family import Family, Grid, ImageTokens


def attentions(model: Any) -> list[Any]:
    return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]


def image(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    text, tokens = arguments["encoder_hidden_states"].shape[1], arguments["hidden_states"].shape[1]
    grid = grid_of_ids(arguments["img_ids"])
    return ImageTokens((text, tokens), grid, text=(0, text), keys=text + tokens)


def image_with_references(model: Any, arguments: dict[str, Any]) -> ImageTokens:
    """FLUX.3: reference images follow, in an argument of their own."""
    found, references = image(model, arguments), arguments.get("image_cond_hidden_states")
    keys = None if found.keys is None else found.keys + (0 if references is None else references.shape[1])
    return replace(found, keys=keys)


def joint_attentions(model: Any) -> list[Any]:
    """Those of FLUX.3: in its other blocks text and image attend to themselves only."""
    return [block.attn for block in model.single_transformer_blocks]


class _IdsGrid:
    """The grid of ``img_ids`` [queries, (image, row, column, ...)], in row-major order, computed when first needed."""

    reads_tensors = True  # which waits for the device

    def __init__(self, ids: Tensor, version: int | None, start: int) -> None:
        self.ids = ids.detach()[..., start:, :].clone()  # they may be modified before maps are read
        self.version, self.start = version, start
        self.grid: Grid | None = None

    def __call__(self, queries: int) -> Grid:
        if self.grid is None:
            ids = self.ids[0] if self.ids.ndim == 3 else self.ids
            same_image = ids[:, 0] == ids[0, 0]
            tokens, columns = int(same_image.sum()), int((same_image & (ids[:, 1] == ids[0, 1])).sum())
            self.grid = tokens // columns, columns
        return self.grid


_cache = WeakIdKeyDictionary()  # img_ids tensor -> its latest _IdsGrid


def grid_of_ids(ids: Tensor, start: int = 0) -> Callable[[int], Grid]:
    """The grid of the image whose ids begin at ``start``, as a function of the number of queries."""
    version = None if ids.is_inference() else ids._version
    cached: _IdsGrid | None = _cache.get(ids)
    if cached is None or version is None or (cached.version, cached.start) != (version, start):
        cached = _cache[ids] = _IdsGrid(ids, version, start)
    return cached


def default_blocks(model: Any) -> str | Sequence[int]:
    depth = len(model.transformer_blocks), len(model.single_transformer_blocks)
    return range(10, 19) if depth == (19, 38) else "all"


# Of an image prompt adapter the first call is the one with the text.
_PROCESSORS = ("FluxAttnProcessor", "FusedFluxAttnProcessor2_0", "FluxIPAdapterAttnProcessor")
FLUX = Family(attentions, image, processors=_PROCESSORS, default_blocks=default_blocks, call=0)
_PROCESSORS_2 = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
FLUX2 = Family(attentions, image, processors=_PROCESSORS_2)
FLUX3 = Family(joint_attentions, image_with_references, processors=("Flux3AttnProcessor",))
CHROMA = Family(attentions, image, processors=("FluxAttnProcessor",))
OVIS = Family(attentions, image, processors=("OvisImageAttnProcessor",))
LONGCAT = Family(attentions, image, processors=("LongCatImageAttnProcessor",))
