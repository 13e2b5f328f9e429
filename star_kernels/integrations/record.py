"""record_maps: the maps of every forward pass of a rollout, and their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from star_kernels.allocation import allocate
from star_kernels.capture import MapCapture, capture_maps
from star_kernels.capture.family import Grid, Text, unwrapped
from star_kernels.capture.hooks import Hook
from star_kernels.selection import TokenSelection


class RecordedMaps:
    """Maps in the order of the captured passes: ``maps[i]`` is ``[B, G, h, w]``, ``[B, G, f, h, w]`` of a video."""

    def __init__(self, capture: MapCapture, passes: int | None = None) -> None:
        self.maps: list[Tensor] = []
        self._capture, self._passes = capture, passes

    def _take(self, *_: object) -> None:
        """Stores the maps of a forward pass if it was captured."""
        if self._capture.ready:
            self.maps.append(self._capture.take())
            self._capture.enabled = len(self.maps) != self._passes

    def weights(
        self, *, steps: slice | None = None, strength: float = 1.0, over: str = "step", cap: float | None = None
    ) -> Tensor:
        """Weights with mean one, from the sum of the maps of all phrases: ``[B, Steps, h, w]``, or with frames.

        Args:
            steps: the recorded passes to use, for a window of steps; with ``over="trajectory"`` the allocation is
                among them. All if None.
            strength, over, cap: see :func:`star_kernels.allocate`.

        Raises:
            RuntimeError: no maps were recorded.
            ValueError: there are fewer maps than ``steps`` needs.
        """
        if not self.maps:
            raise RuntimeError("no maps were recorded: the transformer did not run within record_maps")
        chosen = self.maps if steps is None else self.maps[steps]
        if not chosen or (steps is not None and max(steps.stop or 0, -(steps.start or 0)) > len(self.maps)):
            raise ValueError(f"steps must be recorded passes, of which there are {len(self.maps)}, got {steps}")
        maps = torch.stack([taken.sum(dim=1) for taken in chosen], dim=1)  # [B, Steps, h, w], of a video [.., f, h, w]
        return allocate(maps, layout="bshw" if maps.ndim == 4 else "bsfhw", strength=strength, over=over, cap=cap)


@contextmanager
def record_maps(
    transformer: nn.Module,
    selection: TokenSelection,
    *,
    passes: int | None = None,
    blocks: str | Sequence[int] = "default",
    cfg: str | None = "auto",
    rows: tuple[int, int] | None = None,
    grid: Grid | None = None,
    text: Text | None = None,
    detach: bool = True,
    output: str = "auto",
    call: int | None = None,
    keys: int | None = None,
) -> Iterator[RecordedMaps]:
    """Context manager that records the attention maps of every forward pass of a diffusers transformer.

    Passes that skip layers (skip-layer guidance) have no maps and are not recorded.

    Args:
        transformer: the model that the pipeline of the rollout runs, with or without wrappers.
        selection: the selected tokens of each sample's prompt, on the model's device.
        passes: number of forward passes to record; later ones run as without a capture. All if None.
        blocks, cfg, rows, grid, text, detach, output, call, keys: see :func:`star_kernels.capture.attach_maps`.

    Example:
        >>> with record_maps(pipeline.transformer, selection) as recorded:
        ...     images, latents, log_probs = pipeline_with_logprob(pipeline, ...)
        >>> weights = recorded.weights()  # [B, Steps, h, w]
    """
    with capture_maps(
        transformer,
        selection,
        blocks=blocks,
        cfg=cfg,
        rows=rows,
        grid=grid,
        text=text,
        detach=detach,
        output=output,
        call=call,
        keys=keys,
    ) as capture:
        recorded = RecordedMaps(capture, passes)
        hook = unwrapped(transformer).register_forward_hook(Hook(recorded, "_take"))  # after the capture's hook
        try:
            yield recorded
        finally:
            hook.remove()
