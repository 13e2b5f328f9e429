"""Attention maps of a diffusers transformer, taken from the forward pass that runs anyway.

So far SD3 and SD3.5; each model family is one file beside this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from star_kernels.capture import sd3
from star_kernels.selection import EMPTY, TokenSelection

__all__ = ["MapCapture", "capture_maps"]

_FAMILIES = {"SD3Transformer2DModel": sd3}
_HALVES = ("last", "first", None)


class MapCapture:
    """The maps of the latest forward pass: the mean over the chosen blocks and their heads."""

    def __init__(self, selection: TokenSelection, blocks: int, cfg: str | None) -> None:
        self.selection = selection
        self._blocks = blocks
        self._cfg = cfg
        self._batch_selection = _for_whole_batch(selection, cfg)
        self._sum: Tensor | None = None
        self._grid: tuple[int, int] = (0, 0)
        self._seen = 0

    @property
    def value(self) -> Tensor:
        """float32 ``[B, G, h, w]`` on the patch grid, detached; B is the batch of the selection.

        Raises:
            RuntimeError: no forward pass has gone through all the chosen blocks yet.
        """
        if self._sum is None or self._seen != self._blocks:
            raise RuntimeError(
                f"no maps yet: {self._seen} of {self._blocks} chosen blocks have run; call the transformer inside "
                "capture_maps before reading value"
            )
        return (self._sum / self._blocks).unflatten(-1, self._grid)

    def begin(self, grid: tuple[int, int]) -> None:
        """A forward pass starts, on a patch grid of (rows, columns)."""
        self._sum, self._seen, self._grid = None, 0, grid

    def batch_selection(self, batch: int) -> TokenSelection:
        """The selection for all samples of a forward pass; the half that is not wanted selects nothing."""
        expected = self._batch_selection.batch
        if batch != expected:
            halves = (
                "" if self._cfg is None else f" (twice the selection's {self.selection.batch}, for cfg={self._cfg!r})"
            )
            raise ValueError(f"the transformer must be called with a batch of {expected}{halves}, got {batch}")
        return self._batch_selection

    def add(self, maps: Tensor) -> None:
        """One block's maps ``[batch, G, R]``."""
        wanted = self.selection.batch
        maps = maps.detach()[-wanted:] if self._cfg == "last" else maps.detach()[:wanted]
        self._sum = maps if self._sum is None else self._sum + maps
        self._seen += 1


@contextmanager
def capture_maps(
    transformer: nn.Module,
    selection: TokenSelection,
    *,
    blocks: str | Sequence[int] = "all",
    cfg: str | None = "last",
) -> Iterator[MapCapture]:
    """Collects text-image attention maps of every forward pass of a diffusers transformer inside the context.

    The blocks' attention runs through :func:`star_kernels.attention`; outputs are those of exact attention, and on
    leaving the context the model is as it was.

    Args:
        transformer: an ``SD3Transformer2DModel``.
        selection: positions in the joint sequence (SD3: image tokens first, then text), on the model's device.
        blocks: "all", or indices of the transformer blocks to average over.
        cfg: which half of a batch doubled for classifier-free guidance is conditional: "last" as in diffusers'
            pipelines, "first", or None for a batch that is not doubled.

    Yields:
        A :class:`MapCapture`; its ``value`` is ``[B, G, h, w]`` after a forward pass.

    Raises:
        TypeError, ValueError: a model, block, selection or option that is not supported; the message names it.
    """
    family = _FAMILIES.get(type(_unwrapped(transformer)).__name__)
    if family is None:
        raise TypeError(f"transformer must be one of {', '.join(_FAMILIES)}, got {type(transformer).__name__}")
    if not isinstance(selection, TokenSelection):
        raise TypeError(f"selection must be a TokenSelection, got {type(selection).__name__}")
    if cfg not in _HALVES:
        raise ValueError(f"cfg must be 'last', 'first' or None, got {cfg!r}")
    model = _unwrapped(transformer)
    attentions = family.attentions(model)
    chosen = _choose(blocks, len(attentions))
    capture = MapCapture(selection, len(chosen), cfg)

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture.begin(family.grid(model, args, kwargs))

    originals = [(attentions[i], attentions[i].processor) for i in chosen]
    for _, processor in originals:
        family.check_processor(processor)
    handle = model.register_forward_pre_hook(start, with_kwargs=True)
    try:
        for attention, processor in originals:
            attention.processor = family.CapturingProcessor(processor, capture)
        yield capture
    finally:
        handle.remove()
        for attention, processor in originals:
            attention.processor = processor


def _unwrapped(transformer: nn.Module) -> Any:
    """The module under torch.compile's wrapper."""
    return getattr(transformer, "_orig_mod", transformer)


def _choose(blocks: str | Sequence[int], count: int) -> list[int]:
    if blocks == "all":
        return list(range(count))
    indices = [] if isinstance(blocks, str) else list(blocks)
    good = all(isinstance(i, int) and -count <= i < count for i in indices)
    if not indices or not good or len({i % count for i in indices}) != len(indices):
        raise ValueError(f"blocks must be 'all' or distinct indices below {count}, got {blocks!r}")
    return [i % count for i in indices]


def _for_whole_batch(selection: TokenSelection, cfg: str | None) -> TokenSelection:
    if cfg is None:
        return selection
    index, weight = torch.full_like(selection.index, EMPTY), torch.zeros_like(selection.weight)
    halves = [(index, weight), (selection.index, selection.weight)]
    (index, first_weight), (last_index, weight) = halves if cfg == "last" else halves[::-1]
    return TokenSelection(torch.cat([index, last_index]), torch.cat([first_weight, weight]))
