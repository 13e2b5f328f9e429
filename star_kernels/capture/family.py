"""Model families: what a capture needs to know of a model, and the registry of known families."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from star_kernels.selection import TokenSelection

GUIDE = "docs/adding-a-model.md"

Grid = tuple[int, ...]  # rows and columns of image tokens, or frames, rows and columns of a video
Text = tuple[int, int | None]  # start and length of the text among the keys; None if the length is unknown


@dataclass(frozen=True)
class ImageTokens:
    """The queries of an attention call that are image positions, or video positions, in row-major order.

    Args:
        rows: their range, as (start, length); None if all queries are image positions (cross-attention).
        grid: rows and columns of the image, or frames, rows and columns of the video, or a function that returns them
            for a number of queries. The function is called when maps are read, so it may read values of tensors.
            Further queries (reference images) are dropped.
        text: the keys that are text, as (start, length), or (start, None) if the length is unknown. Positions of a
            selection count from its start; a position that is not below its length is an error. If None, positions of a
            selection are positions of keys.
        keys: the number of keys of the attention call whose maps are wanted. The maps are those of the processor's call
            with this number of keys, and a processor without such a call, or with two, is an error. If None,
            :attr:`Family.call` decides.
        lengths: of the text of each sample, if they differ and the image of a sample follows its own text: ``rows`` are
            those of all images, and the maps of a sample begin at the length of its text. None if all samples have the
            same rows. Requires a grid that is not a function.
    """

    rows: tuple[int, int] | None
    grid: Grid | Callable[[int], Grid]
    text: Text | None = None
    keys: int | None = None
    lengths: tuple[int, ...] | None = None

    def grid_of(self, queries: int) -> Grid:
        return self.grid(queries) if callable(self.grid) else self.grid

    def of_samples(self, maps: Tensor) -> Tensor:
        """Of maps ``[B, ..., R]`` of all rows, those of each sample's own image."""
        if self.lengths is None:
            return maps
        if self.rows is None or callable(self.grid):
            raise ValueError(f"lengths require rows and a grid that is not a function, got {self}")
        starts = torch.tensor(self.lengths, device=maps.device) - self.rows[0]
        own = starts[:, None] + torch.arange(self.grid[0] * self.grid[1], device=maps.device)
        own = own.view(len(own), *(1,) * (maps.ndim - 2), -1)
        return maps.gather(-1, own.expand(*maps.shape[:-1], -1))

    def check_samples(self, selection: TokenSelection) -> None:
        """Raises unless the selected positions of each sample are its own text. Waits for the device."""
        if self.lengths is None or len(self.lengths) != selection.batch:  # the attention call checks the batch size
            return
        for b, (last, length) in enumerate(zip(selection.index.amax(dim=1).tolist(), self.lengths, strict=True)):
            if last >= length:
                raise ValueError(
                    f"selection.index must be positions of text, below {length} for sample {b} in this pass, got {last}"
                )


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        attentions: returns the attention modules of a model whose keys include the text, in the order in which they
            run.
        image: returns the image tokens, given the model and the arguments of its forward pass by name; None for a pass
            that is not to be captured, such as one with perturbed attention.
        processors: names of the supported processor classes: those whose first attention call has this order of
            tokens. Any class if empty.
        default_blocks: the meaning of ``blocks="default"``: "all", indices, or a function of the model that returns
            either. It should name blocks only for the models for which a publication did.
        cfg: which half of a batch is conditional, "last" or "first", if the family's pipelines double the batch for
            classifier-free guidance; None if they do not.
        call: which attention call of a processor has the text among its keys, counted from zero, or a function of the
            attention module that returns it. Needed only for processors that make several calls, if
            :attr:`ImageTokens.keys` does not tell them apart. If neither is given, several calls are an error. If both
            are given, both have to hold.
    """

    attentions: Callable[[Any], list[Any]]
    image: Callable[[Any, dict[str, Any]], ImageTokens | None]
    processors: tuple[str, ...] = ()
    default_blocks: str | Sequence[int] | Callable[[Any], str | Sequence[int]] = "all"
    cfg: str | None = None
    call: int | Callable[[Any], int] | None = None

    def call_of(self, attention: Any) -> int | None:
        """The index of the captured attention call of this module's processor."""
        return self.call(attention) if callable(self.call) else self.call

    def default_of(self, model: Any) -> str | Sequence[int]:
        """The blocks of ``blocks="default"`` for this model."""
        return self.default_blocks(model) if callable(self.default_blocks) else self.default_blocks


FAMILIES: dict[str, Family] = {}


def register_family(model_class: str, family: Family) -> None:
    """Registers a family under the name of its model class. Subclasses of that class belong to the family too."""
    FAMILIES[model_class] = family


def unwrapped(transformer: Any) -> Any:
    """The diffusers model inside the wrappers of torch.compile, peft and DistributedDataParallel."""
    while find(transformer) is None:
        if hasattr(transformer, "_orig_mod"):
            transformer = transformer._orig_mod
        elif hasattr(transformer, "get_base_model"):
            transformer = transformer.get_base_model()
        elif isinstance(getattr(transformer, "module", None), nn.Module):
            transformer = transformer.module
        else:
            break
    return transformer


def find(model: Any) -> Family | None:
    """The family of a model's class or of one of its base classes (fully_shard makes a subclass)."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def processing(model: Any) -> list[Any]:
    """All modules with an attention processor."""
    return [module for module in model.modules() if callable(getattr(module, "processor", None))]


def find_or_explain(model: Any, image: ImageTokens | None) -> Family:
    """The family of a model. With given image tokens, any model that has attention processors is accepted."""
    family = find(model)
    if family is not None:
        return family
    if not isinstance(model, nn.Module):
        parts = [name for name in ("transformer", "unet") if isinstance(getattr(model, name, None), nn.Module)]
        hint = "".join(f"; pass its {name}, pipeline.{name}" for name in parts[:1])
        raise TypeError(f"transformer must be a model, got {type(model).__name__}{hint}")
    found = Counter(type(module.processor).__name__ for module in processing(model))
    if found and image is not None:
        return Family(attentions=processing, image=lambda model, arguments: image)
    listed = ", ".join(f"{name} ({count})" for name, count in found.items())
    raise TypeError(
        f"transformer must be one of {', '.join(FAMILIES)}, got {type(model).__name__}. "
        + (
            f"Its attention processors: {listed}. Pass rows=(start, length) and grid=(rows, columns) of its image "
            f"tokens, grid=(frames, rows, columns) of its video tokens, or register an adapter: {GUIDE}"
            if found
            else f"It has no attention processors; {GUIDE} explains how to add a model"
        )
    )
