"""The handle of a capture: it follows the forward passes of a model and holds the maps of the latest."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels.capture.answer import Block, Pass, Passes
from star_kernels.capture.checkpointing import Checkpointing
from star_kernels.capture.family import Family, Grid, ImageTokens
from star_kernels.selection import EMPTY, TokenSelection

HALVES = ("last", "first", None)


class MapCapture:
    """Attention maps of every forward pass of a model: the mean over the chosen blocks and their heads.

    Made by :func:`star_kernels.capture.attach_maps`. It is a context manager; leaving it removes the capture.

    Attributes:
        enabled: False leaves forward passes alone, such as an unconditional or a reference pass, and keeps the maps.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        attentions: dict[str, Any],
        *,
        rows: tuple[int, int] | None,
        grid: Grid | None,
        cfg: str | None,
        detach: bool,
    ) -> None:
        self.enabled = True
        self._model, self._family, self._cfg = model, family, cfg
        self._given = {name: given for name, given in (("rows", rows), ("grid", grid)) if given is not None}
        self._passes = Passes()
        self._blocks = [Block(name, attention, self._passes, detach) for name, attention in attentions.items()]
        self._checkpointing = Checkpointing(model, self._passes, self._blocks)
        self._value: Tensor | None = None
        self._image: ImageTokens | None = None  # of the pass that gave the maps, as is the batch
        self._batch = 0
        self.selection = None
        for block in self._blocks:
            block.install()
        eager = torch.compiler.disable  # a compiled model calls its hooks outside its graph
        self._hooks = [
            model.register_forward_pre_hook(eager(self._begin), with_kwargs=True),
            model.register_forward_hook(eager(self._end), always_call=True),
        ]

    @property
    def selection(self) -> TokenSelection | None:
        """The tokens of the forward passes to come; None captures nothing. Setting it changes nothing in the model."""
        return self._selection

    @selection.setter
    def selection(self, selection: TokenSelection | None) -> None:
        if selection is not None and not isinstance(selection, TokenSelection):
            raise TypeError(f"selection must be a TokenSelection, got {type(selection).__name__}")
        self._selection = selection
        self._whole = None if selection is None else _for_whole_batch(selection, self._cfg)

    @property
    def value(self) -> Tensor:
        """float32 ``[B, G, h, w]`` of the latest captured pass; B is the batch of its selection.

        Blocks of different resolution (UNets) are brought to the finest of them, bilinearly.

        Raises:
            RuntimeError: no forward pass has gone through all the chosen blocks yet.
        """
        if self._value is None:
            self._value = self._mean()
        return self._value

    def take(self) -> Tensor:
        """The value, of which the handle lets go: it keeps neither the maps nor their graph until the next pass."""
        value = self.value
        self._forget()
        return value

    def remove(self) -> None:
        """Takes the capture out of the model, which is then as it was. The maps stay readable."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            block.remove()
        self._checkpointing.end()
        self._hooks = []

    def __enter__(self) -> MapCapture:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model:  # a copy of it, which has this hook too
            return
        self._passes.current = None
        if self._selection is None or self._whole is None or not self.enabled:
            return
        self._forget()
        arguments = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        self._image = replace(self._family.image(model, arguments), **self._given)
        self._batch = self._selection.batch
        doubled = "" if self._cfg is None else f" (twice the selection's {self._batch}, for cfg={self._cfg!r})"
        self._passes.current = Pass(self._whole, doubled, self._image.rows)
        self._passes.open = True
        self._checkpointing.begin()

    def _end(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        if model is not self._model or not self._passes.open:
            return
        self._passes.open = False
        self._checkpointing.end()
        silent = [block for block in self._blocks if block.maps is None]
        if silent and output is not None:  # without an output an exception is on its way
            backend = getattr(silent[0].capturing, "_attention_backend", None)
            raise RuntimeError(
                f"no maps from {', '.join(block.name for block in silent)}: the attention there did not go through "
                f"F.scaled_dot_product_attention (its attention backend: {getattr(backend, 'value', backend)}); "
                'call transformer.set_attention_backend("native")'
            )

    def _forget(self) -> None:
        self._value = None
        for block in self._blocks:
            block.maps = None

    def _mean(self) -> Tensor:
        found = [block.maps for block in self._blocks if block.maps is not None]
        if len(found) != len(self._blocks) or self._image is None:
            raise RuntimeError(
                f"no maps yet: {len(found)} of {len(self._blocks)} chosen blocks have run; call the transformer, with "
                "a selection set, before reading them"
            )
        grids = [self._image.grid_of(maps.shape[-1]) for maps in found]
        finest = max(grids)
        wanted = slice(-self._batch, None) if self._cfg == "last" else slice(self._batch)
        parts = [_on_grid(maps[wanted], grid, finest) for maps, grid in zip(found, grids, strict=True)]
        return torch.stack(parts).mean(dim=0)


def _on_grid(maps: Tensor, grid: Grid, finest: Grid) -> Tensor:
    """``[B, G, R]`` as ``[B, G, h, w]`` of the finest grid."""
    rows, columns = grid
    if rows * columns > maps.shape[-1]:
        raise ValueError(f"grid must hold at most the {maps.shape[-1]} image rows, got {rows} x {columns}")
    maps = maps[..., : rows * columns].unflatten(-1, grid)
    return maps if grid == finest else F.interpolate(maps, finest, mode="bilinear")


def _for_whole_batch(selection: TokenSelection, cfg: str | None) -> TokenSelection:
    """The selection for a batch doubled for guidance: the half that is not wanted selects nothing."""
    if cfg is None:
        return selection
    index, weight = torch.full_like(selection.index, EMPTY), torch.zeros_like(selection.weight)
    halves = [(index, weight), (selection.index, selection.weight)]
    (index, first_weight), (last_index, weight) = halves if cfg == "last" else halves[::-1]
    return TokenSelection(torch.cat([index, last_index]), torch.cat([first_weight, weight]))
