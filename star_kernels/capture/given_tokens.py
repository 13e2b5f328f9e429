"""The rows, grid, text and keys that were given to ``attach_maps``, in place of those of the model family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from star_kernels.capture.family import Grid, ImageTokens


class GivenTokens:
    """Replaces the image tokens of each pass, and raises if they cannot be right.

    A grid alone must be that of the family, unless the family would have to wait for a GPU to know it. With rows, which
    the family cannot check, all passes must have the image size of the first one.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        """``given``: values of the fields of ImageTokens; those that are None are the family's."""
        self._given = {name: value for name, value in given.items() if value is not None}
        self._text_first = self._given.get("rows", (0,))[0] > 0
        self._shapes: dict[str, Any] | None = None  # of the arguments of the first pass that was completed
        self._latest: dict[str, Any] | None = None  # of the pass that runs

    def in_place_of(self, image: ImageTokens, arguments: dict[str, Any]) -> ImageTokens:
        """The image tokens of a pass.

        Args:
            image: those of the family.
            arguments: of the model's forward pass by name, the latent first, as in diffusers.

        Raises:
            ValueError: the given rows or grid are not those of this pass.
        """
        if not self._given:
            return image
        if "rows" in self._given:
            if image.lengths is not None:
                raise ValueError("rows must be None: in this pass the image rows differ between samples")
            self._check_shapes(arguments)
            return replace(image, **self._given)
        image = replace(image, **{name: value for name, value in self._given.items() if name != "grid"})
        if "grid" not in self._given:
            return image
        grid = self._given["grid"]
        if not callable(image.grid):
            return replace(image, grid=_checked(grid, image.grid))
        latent = next(iter(arguments.values()))
        if getattr(image.grid, "reads_tensors", False) and getattr(latent, "is_cuda", False):  # and so would wait
            return replace(image, grid=grid)
        return replace(image, grid=lambda queries: _checked(grid, image.grid_of(queries)))

    def completed(self) -> None:
        """The pass of the latest :meth:`in_place_of` has given its maps."""
        self._shapes = self._shapes or self._latest

    def _check_shapes(self, arguments: dict[str, Any]) -> None:
        shapes = {name: _shape(value) for name, value in list(arguments.items())[:1]}
        text = "encoder_hidden_states"
        if self._text_first and arguments.get(text) is not None:
            shapes[text] = _shape(arguments[text])
        self._latest = shapes
        for name, shape in shapes.items():
            if self._shapes is not None and shape != self._shapes.get(name):
                raise ValueError(
                    f"rows and grid were used with {name} of shape {self._shapes.get(name)} (per sample), and in this "
                    f"pass it has {shape}: attach another capture with the rows and the grid of this pass"
                )


def _shape(value: Any) -> Any:
    """The shape of an argument without its batch; of a list of samples, the shapes of each."""
    if hasattr(value, "shape"):
        return list(value.shape[1:])
    return [list(getattr(sample, "shape", ())) for sample in value] if isinstance(value, list | tuple) else None


def _checked(given: Grid, grid: Grid) -> Grid:
    if given != grid:
        raise ValueError(
            f"grid must be that of the image in this pass, {_by(grid)}, got {_by(given)}: leave it out, or pass "
            "rows too"
        )
    return given


def _by(grid: Grid) -> str:
    return " x ".join(map(str, grid))
