"""What the capture has to know of a model family, and the families it knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

GUIDE = "docs/adding-a-model.md"

Grid = tuple[int, int]  # rows and columns of image tokens


@dataclass(frozen=True)
class ImageTokens:
    """The queries of an attention call that are image positions, in row-major order.

    Args:
        rows: their range, as (start, length); None where all queries are (cross-attention).
        grid: rows and columns of the image, or a function that gives them for a number of queries; it is called when
            maps are read, so it may look at values of tensors. Queries beyond the grid's (reference images) are cut.
        text: the keys that are text, as (start, length): a selection of others is an error. None: not checked.
    """

    rows: tuple[int, int] | None
    grid: Grid | Callable[[int], Grid]
    text: tuple[int, int] | None = None

    def grid_of(self, queries: int) -> Grid:
        return self.grid(queries) if callable(self.grid) else self.grid


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        attentions: the attention modules of a model whose keys hold the text, in the order in which they run.
        image: the image tokens, from the model and the arguments of its forward pass by name.
        processors: names of the processor classes whose first attention call has this order of tokens; empty: any.
        default_blocks: what ``blocks="default"`` means, where a measurement says which blocks localise best.
        cfg: which half is conditional, "last" or "first", where the family's pipelines double the batch for
            classifier-free guidance; None where they do not.
    """

    attentions: Callable[[Any], list[Any]]
    image: Callable[[Any, dict[str, Any]], ImageTokens]
    processors: tuple[str, ...] = ()
    default_blocks: str | Sequence[int] = "all"
    cfg: str | None = None


FAMILIES: dict[str, Family] = {}


def register_family(model_class: str, family: Family) -> None:
    """Makes a family known by the name of its model class; subclasses are found too."""
    FAMILIES[model_class] = family


def unwrapped(transformer: Any) -> Any:
    """The diffusers model under torch.compile's, peft's and DistributedDataParallel's wrappers."""
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
    """The family of a model's class or of a class that it derives from, as after fully_shard."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def processing(model: Any) -> list[Any]:
    """All modules with an attention processor."""
    return [module for module in model.modules() if callable(getattr(module, "processor", None))]


def find_or_explain(model: Any, image: ImageTokens | None) -> Family:
    """The family of a model; with given image tokens any model with attention processors is one."""
    family = find(model)
    if family is not None:
        return family
    found = Counter(type(module.processor).__name__ for module in processing(model))
    if found and image is not None:
        return Family(attentions=processing, image=lambda model, arguments: image)
    listed = ", ".join(f"{name} ({count})" for name, count in found.items())
    raise TypeError(
        f"transformer is a {type(model).__name__}, which is not known; known are {', '.join(FAMILIES)}. "
        + (
            f"Its attention processors: {listed}. Give rows=(start, length) and grid=(rows, columns) of its image "
            f"tokens, or write an adapter: {GUIDE}"
            if found
            else f"It has no attention processors; how to write an adapter: {GUIDE}"
        )
    )
