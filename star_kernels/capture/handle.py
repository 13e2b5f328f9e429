"""The handle of a capture: it follows the forward passes of a model and holds the maps of the latest."""

from __future__ import annotations

import inspect
import threading
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels.capture import guidance
from star_kernels.capture.answer import Block
from star_kernels.capture.checkpointing import Checkpointing
from star_kernels.capture.family import Family, Grid, ImageTokens
from star_kernels.capture.hooks import Hook
from star_kernels.capture.passes import Pass, Passes
from star_kernels.capture.silence import reason
from star_kernels.selection import EMPTY, TokenSelection


class MapCapture:
    """Attention maps of every forward pass of a model: the mean over the chosen blocks and their heads.

    Made by :func:`star_kernels.capture.attach_maps`. It is a context manager; leaving it removes the capture.
    It follows one thread at a time: it is an error to begin a pass while another thread's is running, and to read maps
    that another thread's pass has replaced.

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
        self._model, self._family = model, family
        self._guidance = guidance.Guidance(cfg, family.cfg)
        self._given = {name: given for name, given in (("rows", rows), ("grid", grid)) if given is not None}
        self._passes = Passes()
        self._lock = threading.RLock()
        self._blocks = [Block(name, attention, self._passes, detach) for name, attention in attentions.items()]
        self._checkpointing = Checkpointing(model, self._passes, self._blocks)
        self._value: Tensor | None = None
        self._image: ImageTokens | None = None  # of the pass that gave the maps, as is the part of its batch
        self._wanted = slice(None)
        self.selection = None
        for block in self._blocks:
            block.install()
        self._hooks = [
            model.register_forward_pre_hook(Hook(self, "_begin"), with_kwargs=True),
            # Before those of earlier captures, which began first and end last.
            model.register_forward_hook(Hook(self, "_end"), always_call=True, prepend=True),
        ]

    @property
    def selection(self) -> TokenSelection | None:
        """The tokens of the forward passes to come; None captures nothing. Setting it changes nothing in the model."""
        return self._guidance.selection

    @selection.setter
    def selection(self, selection: TokenSelection | None) -> None:
        if selection is not None and not isinstance(selection, TokenSelection):
            raise TypeError(f"selection must be a TokenSelection, got {type(selection).__name__}")
        with self._lock:
            self._guidance.selection = selection

    @property
    def ready(self) -> bool:
        """Whether there are maps to read: of a captured pass that came to its end, and not taken yet."""
        return not self._passes.open and all(block.maps is not None for block in self._blocks)

    @property
    def value(self) -> Tensor:
        """float32 ``[B, G, h, w]`` of the latest captured pass; B is the batch of its selection.

        Blocks of different resolution (UNets) are brought to the finest of them, bilinearly.

        Raises:
            RuntimeError: no forward pass has gone through all the chosen blocks yet, or the latest was another thread's
                while this one has run passes too.
        """
        with self._lock:
            self._passes.check_reader()
            if self._value is None:
                self._value = self._mean()
            return self._value

    def take(self) -> Tensor:
        """The value, of which the handle lets go: it keeps neither the maps nor their graph until the next pass."""
        with self._lock:
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
        self._passes.current = None  # for processors that someone has kept
        self._hooks = []

    def __enter__(self) -> MapCapture:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model:  # a replica of it, which shares this hook
            return
        with self._lock:
            self._passes.clear()
            selection = self.selection
            if selection is None or not self.enabled:
                return
            arguments = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
            if arguments.get("skip_layers"):  # skip-layer guidance: a pass without some of the blocks
                return
            self._forget()
            try:
                image = self._family.image(model, arguments)
            except KeyError as missing:
                raise ValueError(f"transformer must be called with {missing} while it is captured") from None
            self._image = replace(image, **self._given)
            if self._image.text is not None:
                _check_text(selection, *self._image.text)
            whole, self._wanted, expected = self._guidance.of_pass(selection, arguments)
            self._passes.begin(Pass(whole, expected, self._image.rows, torch.is_grad_enabled()))
            self._checkpointing.begin()

    def _end(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        if model is not self._model:
            return
        with self._lock:  # until all is seen, no other thread's pass begins
            if not self._passes.end():
                return
            self._checkpointing.end()
            silent = [block for block in self._blocks if block.maps is None]
            if output is None:  # an exception is on its way
                if not silent:
                    self._forget()
            elif silent:
                names = ", ".join(block.name for block in silent)
                raise RuntimeError(f"no maps from {names}: {reason(model, silent)}")

    def _forget(self) -> None:
        self._value = None
        for block in self._blocks:
            block.forget()

    def _mean(self) -> Tensor:
        found = [block.maps for block in self._blocks if block.maps is not None]
        if len(found) != len(self._blocks) or self._image is None:
            raise RuntimeError(
                f"no maps yet: {len(found)} of {len(self._blocks)} chosen blocks have run; call the transformer, with "
                "a selection set, before reading them"
            )
        grids = [self._image.grid_of(maps.shape[-1]) for maps in found]
        finest = max(grids)
        parts = [_on_grid(maps[self._wanted], grid, finest) for maps, grid in zip(found, grids, strict=True)]
        return torch.stack(parts).mean(dim=0)


def _on_grid(maps: Tensor, grid: Grid, finest: Grid) -> Tensor:
    """``[B, G, R]`` as ``[B, G, h, w]`` of the finest grid."""
    rows, columns = grid
    if rows * columns > maps.shape[-1]:
        raise ValueError(f"grid must hold at most the {maps.shape[-1]} image rows, got {rows} x {columns}")
    maps = maps[..., : rows * columns].unflatten(-1, grid)
    return maps if grid == finest else F.interpolate(maps, finest, mode="bilinear")


def _check_text(selection: TokenSelection, start: int, length: int) -> None:
    """The selected positions are text in a pass whose text stands at ``start``: numbers that the host has."""
    made = selection.text
    if made is not None and (made[0] != start or made[1] not in (None, length)):
        whose = f"{made[1]} tokens of text" if made[0] == start else f"text that starts at position {made[0]}"
        raise ValueError(
            f"selection was made for {whose} of the joint sequence, but in this pass {length} tokens of text start at "
            f"position {start}: give select_tokens the image_tokens of this resolution, and regions_of the "
            "max_sequence_length of this pass"
        )
    if selection.last != EMPTY and (selection.first < start or selection.last >= start + length):
        raise ValueError(
            f"selection.index must hold positions of text, in this pass {start} to {start + length - 1}, got "
            f"{selection.first} to {selection.last}: a selection belongs to one size of image and length of text"
        )
