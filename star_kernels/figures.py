"""Figures of attention maps and weights: over an image, over denoising steps, for each phrase, between two runs.

Requires the extra ``figures`` (matplotlib). Every function returns a ``matplotlib.figure.Figure``, which a notebook
displays and ``figure.savefig("maps.png")`` writes to a file. Maps are arrays or tensors on any device; images are PIL
images, uint8 arrays ``[H, W, 3]``, or tensors ``[3, H, W]`` with values between 0 and 1. Over an image, a map is
interpolated to the image's size and shown as the opacity of the image's own colours on grey paper. The colour maps are
cividis for amounts without an image and PuOr for differences, which are readable with colour vision deficiency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from star_kernels.captions import LITERAL, caption

__all__ = ["difference", "frames", "overlay", "phrases", "strip", "weights"]

AMOUNT, CHANGE = "cividis", "PuOr"
PANEL = 2.2  # side of a panel in inches
PAPER, INK = 0.82, 0.1  # grey levels of the colour bar where an image is invisible and where it is opaque
FAINT = 0.12  # opacity of an image without attention
OPACITY = LinearSegmentedColormap.from_list("opacity", [str(PAPER), str(INK)])

Array = NDArray[np.float64]


def overlay(image: Any, values: Tensor | ArrayLike, *, title: str = "", top: float | None = None) -> Figure:
    """An image, and beside it the image with the opacity of a map.

    Args:
        image: an image of any size.
        values: ``[h, w]``, non-negative.
        title: title of the map.
        top: the value at which the image is opaque; the maximum of the map by default.
    """
    grid = _map("values", values, 2)
    figure, axes, bar = _panels(2, 2)
    norm = Normalize(0.0, _top(grid, top))
    shared = to_rgb(image)
    _draw_image(axes[0, 0], shared)
    _draw_over(axes[0, 1], shared, grid, norm)
    axes[0, 1].set_title(caption(title, 24), fontsize=9, **LITERAL)
    _amount_bar(figure, bar, norm, shared)
    return figure


def strip(
    maps: Tensor | ArrayLike,
    *,
    images: Sequence[Any] | None = None,
    labels: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
    columns: int = 10,
) -> Figure:
    """The maps of a trajectory side by side, with a common scale; several phrases in a row each.

    Args:
        maps: ``[Steps, h, w]`` or, of phrases, ``[Steps, G, h, w]``, non-negative.
        images: one image for each step, or one for all steps, drawn with the maps as opacity.
        labels: one label for each step, such as ``["sigma = 0.90", ...]``; the step numbers by default.
        names: the G phrases.
        title: title of the figure.
        columns: number of panels side by side. More steps of one map continue in the next row; of more steps of several
            phrases, ``columns`` steps are drawn, evenly spaced from the first to the last.
    """
    grids = _map("maps", maps, 4 if np.ndim(maps) == 4 else 3)
    steps = _labels("labels", labels, len(grids), "step")
    backgrounds = _backgrounds(images, len(grids))
    if grids.ndim == 3:
        if names is not None:
            raise ValueError(f"names requires maps [Steps, G, h, w], got maps {list(grids.shape)}")
        chosen, rows = list(range(len(grids))), [""]
        figure, axes, bar = _panels(len(grids), columns)
        panels = axes.reshape(1, -1)
    else:
        rows = _labels("names", names, grids.shape[1], "phrase")
        figure, axes, bar = _panels(len(rows) * min(columns, len(grids)), min(columns, len(grids)))
        chosen = _spread(len(grids), axes.shape[1])
        panels = axes
    by_row = grids[:, None] if grids.ndim == 3 else grids
    norm = Normalize(0.0, _top(grids, None))
    for row, name in enumerate(rows):
        for axis, step in zip(panels[row], chosen, strict=False):
            _draw_over(axis, backgrounds[step], by_row[step, row], norm)
            if row == 0:
                axis.set_title(caption(steps[step], 18), fontsize=9, **LITERAL)
        panels[row, 0].set_ylabel(caption(name, 20), fontsize=9, **LITERAL)
    _head(figure, title)
    _amount_bar(figure, bar, norm, backgrounds[0])
    return figure


def frames(
    maps: Tensor | ArrayLike,
    *,
    images: Sequence[Any] | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
    columns: int = 10,
) -> Figure:
    """The maps of a video's frames side by side, with a common scale; several phrases, or steps, in a row each.

    Args:
        maps: ``[f, h, w]`` of a phrase at a step, or ``[N, f, h, w]`` of N phrases or steps, non-negative.
        images: the frames of the video, as many as it has: a map of a causal video model covers several of them, and
            is drawn over the last.
        names: the N phrases or steps.
        title: title of the figure.
        columns: largest number of frames, evenly spaced from the first to the last.
    """
    grids = _map("maps", maps, 4 if np.ndim(maps) == 4 else 3)
    if grids.ndim == 3 and names is not None:
        raise ValueError(f"names requires maps [N, f, h, w], got maps {list(grids.shape)}")
    grids = grids if grids.ndim == 4 else grids[None]
    count = grids.shape[1]
    chosen = _spread(count, min(columns, count))
    shown = None
    if images is not None:
        if not isinstance(images, (list, tuple)) or len(images) < count:
            got = len(images) if isinstance(images, (list, tuple)) else type(images).__name__
            raise ValueError(f"images must be a list of at least the {count} frames of maps, got {got}")
        over = _spread(len(images), count)
        shown = [images[over[i]] for i in chosen]
    labels = [f"frame {i}" for i in chosen]
    rows = [""] * len(grids) if names is None else names
    by_frame = grids[:, chosen].swapaxes(0, 1)  # [frames, N, h, w]
    figure = strip(by_frame, images=shown, labels=labels, names=rows, title=title, columns=columns)
    height, width = (to_rgb(shown[0]) if shown else by_frame[0, 0]).shape[:2]
    figure.set_figheight((PANEL * min(1.0, height / width) + 0.35) * len(grids) + 0.6)  # videos are wide
    return figure


def phrases(image: Any, maps: Tensor | ArrayLike, names: Sequence[str], *, title: str = "", columns: int = 5) -> Figure:
    """The image, and a panel for each phrase: the image with the opacity of the phrase's map.

    Each panel has its own scale, with the maximum given below it.

    Args:
        image: an image of any size.
        maps: ``[G, h, w]``, non-negative.
        names: the G phrases.
        title: title of the figure.
        columns: number of panels side by side.
    """
    grids = _map("maps", maps, 3)
    labels = _labels("names", names, len(grids), "phrase")
    figure, axes, bar = _panels(len(grids) + 1, columns)
    shared = to_rgb(image)
    _draw_image(axes.flat[0], shared)
    for axis, grid, name in zip(axes.flat[1:], grids, labels, strict=False):
        top = _top(grid, None)
        _draw_over(axis, shared, grid, Normalize(0.0, top))
        axis.set_title(caption(name, 22), fontsize=9, **LITERAL)
        axis.set_xlabel(f"up to {top:.2g}", fontsize=8)
    _head(figure, title)
    _colour_bar(figure, bar, Normalize(0.0, 1.0), OPACITY, "share of the panel's maximum (opacity)")
    return figure


def difference(
    before: Tensor | ArrayLike,
    after: Tensor | ArrayLike,
    *,
    names: tuple[str, str] = ("before", "after"),
    labels: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """The maps of two runs above each other, and below them their difference (second minus first).

    Args:
        before, after: ``[Steps, h, w]`` or ``[h, w]``, of the same shape.
        names: names of the two runs.
        labels: one label for each step; the step numbers by default.
        title: title of the figure.
    """
    first, second = (_map(name, m, None) for name, m in (("before", before), ("after", after)))
    if first.shape != second.shape:
        raise ValueError(f"after must have the shape of before, {list(first.shape)}, got {list(second.shape)}")
    first, second = (m[None] if m.ndim == 2 else m for m in (first, second))
    steps = _labels("labels", labels, len(first), "step")
    runs = _labels("names", names, 2, "run")
    figure, axes, bar = _panels(3 * len(first), len(first), bars=2)
    amount = Normalize(0.0, _top(np.stack([first, second]), None))
    change = _symmetric(second - first)
    for column, name in enumerate(steps):
        for row, (grid, norm, colours) in enumerate(
            ((first, amount, AMOUNT), (second, amount, AMOUNT), (second - first, change, CHANGE))
        ):
            axes[row, column].imshow(grid[column], norm=norm, cmap=colours, interpolation="nearest")
        axes[0, column].set_title(caption(name, 18), fontsize=9, **LITERAL)
    for row, name in enumerate((*runs, f"{runs[1]} minus {runs[0]}")):
        axes[row, 0].set_ylabel(caption(name, 20), fontsize=9, **LITERAL)
    _head(figure, title)
    _colour_bar(figure, bar[0], amount, AMOUNT, "attention")
    _colour_bar(figure, bar[1], change, CHANGE, "difference")
    return figure


def weights(
    values: Tensor | ArrayLike, *, image: Any = None, labels: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """Weights over space and time: a panel for each step, coloured around one.

    If the mean weights of the steps differ, they are drawn below.

    Args:
        values: ``[Steps, h, w]`` with mean one, over all steps or over each.
        image: an image that is drawn before the first step.
        labels: one label for each step; the step numbers by default.
        title: title of the figure.
    """
    grids = _map("values", values, 3)
    names = _labels("labels", labels, len(grids), "step")
    extra = 0 if image is None else 1
    count = len(grids) + extra
    means = grids.reshape(len(grids), -1).mean(axis=1)
    in_time = not np.allclose(means, 1.0, atol=0.01)
    figure = Figure(figsize=(PANEL * count + 1.2, (2 if in_time else 1) * PANEL + 0.6), layout="constrained")
    parts: Any = figure.subfigures(1 + in_time, 1, height_ratios=(1.1, 1)[: 1 + in_time], squeeze=False)
    upper = parts[0, 0]
    axes = upper.subplots(1, count, squeeze=False)
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, _largest(grids)))
    if image is not None:
        axes[0, 0].imshow(to_rgb(image))
        axes[0, 0].set_title("image", fontsize=9)
    for axis, grid, name in zip(axes.flat[extra:], grids, names, strict=True):
        axis.imshow(grid, norm=norm, cmap=CHANGE, interpolation="nearest")
        axis.set_title(caption(name, 18), fontsize=9, **LITERAL)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    bar = upper.colorbar(ScalarMappable(norm, CHANGE), ax=axes.ravel().tolist(), shrink=0.8)
    bar.set_label("weight (1 = Flow-GRPO)", fontsize=8)
    if in_time:
        axis = parts[1, 0].subplots()
        axis.bar(range(len(means)), means, color="#0072B2")
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(means)), [caption(name, 12) for name in names], fontsize=8, **LITERAL)
        axis.set_ylabel("mean weight of the step", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    _head(figure, title)
    return figure


def over(image: Any, share: Tensor | ArrayLike) -> Array:
    """The image with the opacity of a map, which is interpolated to its size, on grey paper.

    Args:
        image: an image of any size.
        share: ``[h, w]``, 0 where the image is faint and 1 where it is opaque.

    Returns:
        float64 ``[H, W, 3]`` between 0 and 1.
    """
    pixels = to_rgb(image)
    coarse = torch.from_numpy(_map("share", share, 2))[None, None]
    fine = F.interpolate(coarse, pixels.shape[:2], mode="bilinear")[0, 0].numpy()[..., None]
    opacity = FAINT + (1 - FAINT) * fine
    return np.asarray(opacity * (pixels / 255) + (1 - opacity) * PAPER)


def to_rgb(image: Any) -> NDArray[np.uint8]:
    """Converts an image to uint8 ``[H, W, 3]``.

    Raises:
        TypeError, ValueError: unsupported type or shape.
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image must be a tensor [3, H, W], got {list(image.shape)}")
        wide = image.detach().cpu().float()
        if not image.dtype.is_floating_point and image.dtype != torch.bool:
            wide = wide / 255
        return np.asarray((wide.clamp(0, 1) * 255).round().permute(1, 2, 0).to(torch.uint8))
    if hasattr(image, "convert"):  # PIL
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise TypeError(
            "image must be a PIL image, a uint8 array [H, W, 3] or a tensor [3, H, W], got "
            f"{type(image).__name__} of {array.dtype}, shape {list(array.shape)}"
        )
    return array


def _draw_image(axis: Axes, image: NDArray[np.uint8]) -> None:
    axis.imshow(image)
    axis.set_title("image", fontsize=9)


def _draw_over(axis: Axes, image: NDArray[np.uint8] | None, grid: Array, norm: Normalize) -> None:
    """Draws a map; if there is an image, as the opacity of the image."""
    if image is None:
        axis.imshow(grid, norm=norm, cmap=AMOUNT, interpolation="nearest")
        return
    axis.imshow(over(image, np.clip(np.asarray(norm(np.nan_to_num(grid))), 0.0, 1.0)))


def _amount_bar(figure: Figure, axis: Axes, norm: Normalize, image: NDArray[np.uint8] | None) -> None:
    """The colour bar of maps that were drawn by ``_draw_over``."""
    if image is None:
        _colour_bar(figure, axis, norm, AMOUNT, "attention")
    else:
        _colour_bar(figure, axis, norm, OPACITY, "attention (opacity of the image)")


def _panels(count: int, columns: int, bars: int = 1) -> tuple[Figure, NDArray[Any], Any]:
    """A figure with a grid of panels without ticks, and axes for colour bars to their right."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (max(PANEL * columns, 3.0) + 1.2 * bars, (PANEL + 0.35) * rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    ratios = [1.0] * columns + [0.08] * bars
    grid = figure.add_gridspec(rows, columns + bars, width_ratios=ratios)
    axes = np.empty((rows, columns), dtype=object)
    for i in range(rows * columns):
        axis = figure.add_subplot(grid[i // columns, i % columns])
        axis.set(xticks=[], yticks=[])
        axis.set_visible(i < count)
        axes[i // columns, i % columns] = axis
    bar_axes = [figure.add_subplot(grid[:, columns + b]) for b in range(bars)]
    return figure, axes, bar_axes[0] if bars == 1 else bar_axes


def _head(figure: Figure, title: str) -> None:
    """Sets the title of the figure, wrapped to its width."""
    width = int(10 * figure.get_figwidth())  # ten characters per inch
    figure.suptitle(caption(title, width), fontsize=11, **LITERAL)


def _colour_bar(figure: Figure, axis: Axes, norm: Normalize, colours: str | Colormap, label: str) -> None:
    bar = figure.colorbar(ScalarMappable(norm, colours), cax=axis)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _map(name: str, values: Tensor | ArrayLike, dimensions: int | None) -> Array:
    """A map as float64 with the given number of dimensions (2 or 3 if None)."""
    array = np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)
    wanted = (2, 3) if dimensions is None else (dimensions,)
    if array.ndim not in wanted or 0 in array.shape:
        shapes = " or ".join({2: "[h, w]", 3: "[N, h, w]", 4: "[N, G, h, w]"}[d] for d in wanted)
        raise ValueError(f"{name} must have shape {shapes}, none of them 0, got {list(array.shape)}")
    return array


def _labels(name: str, labels: Sequence[str] | None, count: int, word: str) -> list[str]:
    if labels is None:
        return [f"{word} {i}" for i in range(count)]
    if isinstance(labels, str) or len(labels) != count or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{name} must be {count} strings, one for each map, got {labels!r}")
    return list(labels)


def _spread(count: int, shown: int) -> list[int]:
    """Indices below ``count``, evenly spaced from the first to the last."""
    return [round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)]


def _backgrounds(images: Sequence[Any] | None, count: int) -> list[NDArray[np.uint8] | None]:
    if images is None:
        return [None] * count
    if not isinstance(images, (list, tuple)):
        return [to_rgb(images)] * count
    if len(images) != count:
        raise ValueError(f"images must be one image or {count} images, one for each map, got {len(images)}")
    return [to_rgb(image) for image in images]


def _top(values: Array, top: float | None) -> float:
    """The value of the brightest colour, never 0, so that an empty map is dark."""
    if top is not None:
        if not 0 < top < np.inf:
            raise ValueError(f"top must be positive and finite, got {top}")
        return top
    largest = _largest(values)
    return largest if largest > 0 else 1.0


def _symmetric(values: Array) -> Normalize:
    reach = _largest(np.abs(values)) or 1.0
    return Normalize(-reach, reach)


def _largest(values: Array) -> float:
    """The largest finite value, or 0 if there is none."""
    return float(np.max(values, initial=-np.inf, where=np.isfinite(values))) if np.isfinite(values).any() else 0.0
