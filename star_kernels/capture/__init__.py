"""Attention maps of a diffusers model, computed within its regular forward passes.

Each model family has a file in this folder; docs/adding-a-model.md explains how to add another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

from torch import nn

from star_kernels.capture import (
    aura_flow,
    cross_attention,
    flux,
    hidream,
    hunyuan_image,
    hunyuan_video,
    krea2,
    ltx,
    lumina2,
    qwen_image,
    registry,
    sd3,
    wan,
    z_image,
)
from star_kernels.capture.attention_call import OUTPUTS
from star_kernels.capture.family import (
    Family,
    Grid,
    ImageTokens,
    Text,
    find_or_explain,
    register_family,
    unwrapped,
)
from star_kernels.capture.guidance import CHOICES
from star_kernels.capture.handle import MapCapture
from star_kernels.capture.hooks import Hook
from star_kernels.checks import check_flag
from star_kernels.selection import TokenSelection, integers

__all__ = [
    "Family",
    "ImageTokens",
    "MapCapture",
    "attach_maps",
    "capture_maps",
    "detach_maps",
    "live_captures",
    "register_family",
]

register_family("SD3Transformer2DModel", sd3.FAMILY)
register_family("FluxTransformer2DModel", flux.FLUX)
register_family("Flux2Transformer2DModel", flux.FLUX2)
register_family("QwenImageTransformer2DModel", qwen_image.FAMILY)
register_family("UNet2DConditionModel", cross_attention.UNET)
register_family("PixArtTransformer2DModel", cross_attention.PIXART)
register_family("SanaTransformer2DModel", cross_attention.SANA)
register_family("Flux3Transformer2DModel", flux.FLUX3)
register_family("ChromaTransformer2DModel", flux.CHROMA)
register_family("OvisImageTransformer2DModel", flux.OVIS)
register_family("LongCatImageTransformer2DModel", flux.LONGCAT)
register_family("Krea2Transformer2DModel", krea2.FAMILY)
register_family("ZImageTransformer2DModel", z_image.FAMILY)
register_family("HunyuanImageTransformer2DModel", hunyuan_image.FAMILY)
register_family("AuraFlowTransformer2DModel", aura_flow.FAMILY)
register_family("HiDreamImageTransformer2DModel", hidream.FAMILY)
register_family("Lumina2Transformer2DModel", lumina2.FAMILY)
register_family("WanTransformer3DModel", wan.FAMILY)
register_family("LTXVideoTransformer3DModel", ltx.LTX)
register_family("LTX2VideoTransformer3DModel", ltx.LTX2)
register_family("HunyuanVideoTransformer3DModel", hunyuan_video.FAMILY)
register_family("HunyuanVideo15Transformer3DModel", hunyuan_video.FAMILY_15)


def attach_maps(
    transformer: nn.Module,
    selection: TokenSelection | None = None,
    *,
    blocks: str | Sequence[int] = "default",
    cfg: str | None = "auto",
    rows: tuple[int, int] | None = None,
    grid: Grid | None = None,
    text: Text | None = None,
    detach: bool = True,
    output: str = "auto",
    call: int | None = None,
    keys: int | None = None,
) -> MapCapture:
    """Captures text-image attention maps of every forward pass of a diffusers model, until ``remove()``.

    The attention of the chosen blocks is computed by :func:`star_kernels.attention`, whose outputs and gradients are
    those of exact attention, or by the attention backend that was chosen with diffusers' ``set_attention_backend``.
    LoRA, quantised layers, ``fully_shard``, gradient checkpointing and ``torch.compile`` are supported. Compile the
    model or its blocks: in a larger compiled function the capture causes a graph break. If blocks are checkpointed by
    other means than diffusers' gradient checkpointing, call backward before the capture is removed or its selection
    changes. Under tensor parallelism the maps of a device are the mean over its own heads.

    Args:
        transformer: a model of a family that docs/models.md lists, such as SD3, FLUX or Qwen-Image, a class registered
            with :func:`register_family`, or, with ``rows`` and ``grid``, any model whose attention processors call
            ``F.scaled_dot_product_attention`` or diffusers' attention dispatcher.
        selection: the tokens, on the model's device, as positions of the text: 0 is its first token, whether the image
            comes before it in the model or after it. None captures nothing until :attr:`MapCapture.selection` is set.
        blocks: the attention modules to average over: "all", their indices, or "default", the blocks that are known
            to find the words, from published localisation: block 9 of the 24 of SD3-Medium and SD3.5-Medium (arXiv
            2509.18096) and the double-stream blocks 10 to 18 of FLUX.1 (arXiv 2502.04320), counted from zero, 18
            included; all blocks of every other model. Other blocks run their own attention, unchanged.
            ``python -m star_kernels.maps --rank-blocks`` ranks the blocks of any model.
        cfg: which half of the batch is conditional, if it is doubled for classifier-free guidance: "last", "first", or
            None if batches are not doubled. "auto" decides in each pass. A batch of the selection's size is not
            doubled. A batch of twice its size is doubled if the family's pipelines concatenate an unconditional and a
            conditional half (in docs/models.md, with their order) and both halves have equal latents. Any other
            batch is an error, for example one with several images of each prompt. The first comparison of latents for a
            selection waits for the GPU; in later passes the GPU asserts that they are equal.
        rows: range of the image queries as (start, length), overriding the value of the model family. All passes must
            then have latents of the same size.
        grid: rows and columns of the image, or frames, rows and columns of the video: the first rows * columns, or
            frames * rows * columns, image queries. Without ``rows`` it must be the grid that the model family finds,
            and saves FLUX the wait for the device.
        text: where the text is among the keys, as (start, length), overriding the value of the model family; (start,
            None) if its length differs between passes. Without it, positions of a selection are positions of keys in a
            model that is captured by ``rows`` and ``grid`` alone.
        detach: if False, the maps are differentiable, for losses on them. They then keep the graph of the forward pass
            alive until the next pass or ``take()``.
        output: what computes the output of a captured attention call. "model": the function that the model calls, such
            as the attention backend chosen with diffusers' ``set_attention_backend``, so the output is bit for bit
            that without a capture; maps are computed from its log-sum-exp, or in a second pass of attention, with a
            warning, if it returns none. "ours": :func:`star_kernels.attention`, for any backend. "auto": "ours" where
            the model calls PyTorch's ``F.scaled_dot_product_attention`` (diffusers' backend "native") without a mask
            that differs by query, otherwise "model".
        call: which attention call of a processor has the text among its keys, counted from zero, overriding the value
            of the model family.
        keys: the number of keys of that call, overriding the value of the model family. If neither ``call`` nor
            ``keys`` is known, several calls of a processor are an error, and so is a call with as many keys as image
            queries, which are image positions in self-attention.

    Raises:
        TypeError, ValueError: unsupported model, block, selection or option; the message names it.
    """
    if cfg not in CHOICES:
        raise ValueError(f"cfg must be 'auto', 'last', 'first' or None, got {cfg!r}")
    check_flag("detach", detach)
    if output not in OUTPUTS:
        raise ValueError(f"output must be 'auto', 'model' or 'ours', got {output!r}")
    call, keys = _count("call", call, 0), _count("keys", keys, 1)
    rows, grid, text = _pair("rows", rows), _grid(grid), _check_text(text)
    if rows is not None and grid is not None and rows[1] != prod(grid):
        raise ValueError(f"grid must have the {rows[1]} positions of rows, got {' x '.join(map(str, grid))}")
    model = unwrapped(transformer)
    given = None if rows is None or grid is None else ImageTokens(rows, grid, text)
    family = find_or_explain(model, given)
    found = family.attentions(model)
    default = isinstance(blocks, str) and blocks == "default"
    chosen = _choose(family.default_of(model) if default else blocks, len(found))
    attentions = _named(model, [found[i] for i in chosen])
    for name, attention in attentions.items():
        _check_processor(family, name, attention.processor)
    capture = MapCapture(
        model,
        family,
        attentions,
        blocks=chosen,
        overrides={"rows": rows, "grid": grid, "text": text, "keys": keys},
        cfg=cfg,
        detach=detach,
        output=output,
        call=call,
    )
    try:
        capture.selection = selection
    except BaseException:
        capture.remove()
        raise
    return capture


@contextmanager
def capture_maps(
    transformer: nn.Module,
    selection: TokenSelection,
    *,
    blocks: str | Sequence[int] = "default",
    cfg: str | None = "auto",
    rows: tuple[int, int] | None = None,
    grid: Grid | None = None,
    text: Text | None = None,
    detach: bool = True,
    output: str = "auto",
    call: int | None = None,
    keys: int | None = None,
) -> Iterator[MapCapture]:
    """Context manager form of :func:`attach_maps`, with the same options.

    Leaving the context, also by an exception, restores the model.

    Yields:
        A :class:`MapCapture`; its ``value`` is ``[B, G, h, w]``, of a video ``[B, G, f, h, w]``, after a forward pass.
    """
    with attach_maps(
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
        yield capture


def detach_maps(transformer: nn.Module) -> int:
    """Removes all captures of a model, including those whose handle is lost.

    Returns:
        The number of captures removed.
    """
    hooks = [hook for hook in unwrapped(transformer)._forward_pre_hooks.values() if isinstance(hook, Hook)]
    captures = [hook.owner for hook in hooks if isinstance(hook.owner, MapCapture)]
    for capture in captures:
        capture.remove()
    return len(captures)


def live_captures() -> list[MapCapture]:
    """All captures of this process that are attached to a model, including those whose handle is lost.

    The list of captures keeps neither them nor their models alive.

    Example:
        >>> for capture in live_captures():
        ...     print(capture)  # the class of its model, its blocks, and whether it is enabled
        ...     capture.remove()
    """
    return registry.captures()


def _pair(name: str, pair: object) -> tuple[int, int] | None:
    if pair is None:
        return None
    found = integers(pair)
    if found is None or len(found) != 2 or min(found) < 0:
        raise ValueError(f"{name} must be a pair of integers of at least 0, got {pair!r}")
    return found[0], found[1]


def _grid(grid: object) -> Grid | None:
    if grid is None:
        return None
    found = integers(grid)
    if found is None or len(found) not in (2, 3) or min(found) < 0:
        raise ValueError(
            f"grid must be a pair of integers of at least 0, (rows, columns), or three, (frames, rows, columns), got "
            f"{grid!r}"
        )
    return tuple(found)


def _count(name: str, value: object, least: int) -> int | None:
    found = None if value is None else integers([value])
    if value is not None and (not found or found[0] < least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return found[0] if found else None


def _check_text(text: object) -> Text | None:
    if text is None:
        return None
    start, length = text if isinstance(text, Sequence) and len(text) == 2 else (-1, None)
    found = integers([start] if length is None else [start, length])
    if found is None or min(found) < 0 or found[1:] == [0]:
        raise ValueError(f"text must be the (start, length) of the text among the keys, or (start, None), got {text!r}")
    return found[0], None if length is None else found[1]


def _choose(blocks: str | Sequence[int], count: int) -> list[int]:
    if isinstance(blocks, str) and blocks == "all":
        return list(range(count))
    indices = integers(blocks)
    good = all(-count <= i < count for i in indices or ())
    if not indices or not good or len({i % count for i in indices}) != len(indices):
        raise ValueError(f"blocks must be 'all', 'default' or distinct indices below {count}, got {blocks!r}")
    return [i % count for i in indices]


def _named(model: nn.Module, wanted: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The wanted modules by their names in the model, in the given order. Cheaper than ``named_modules``: the search
    stops when all are found, and does not look inside them."""
    names: dict[int, str] = {}
    ids = {id(module) for module in wanted}
    left, stack = len(ids), [("", model)]
    while left and stack:
        name, module = stack.pop()
        if id(module) in names:
            continue
        names[id(module)] = name
        if id(module) in ids:
            left -= 1
        else:
            prefix = f"{name}." if name else ""
            stack += [(prefix + part, child) for part, child in module._modules.items() if child is not None]
    return {names[id(module)]: module for module in wanted}


def _check_processor(family: Family, name: str, processor: Any) -> None:
    got = type(processor).__name__
    if family.processors and got not in family.processors:
        raise TypeError(f"{name} must have an attention processor {' or '.join(family.processors)}, got {got}")
