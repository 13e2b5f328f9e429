"""Attention maps to weights of mean one, which distribute the advantage of a sample over positions and steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from star_kernels import native
from star_kernels.checks import check_dense, check_number
from star_kernels.torch_internals import WATCH

_PLAIN = (Tensor, nn.Parameter)
_MEANS = {"step": (-1,), "trajectory": (-2, -1)}
_FEW = 64  # maps whose largest and smallest values are read
_PARALLEL = 32768  # elements from which PyTorch divides a sum among threads
_SIZES = {"b": "B", "s": "Steps", "g": "G", "p": "P", "f": "f", "h": "h", "w": "w"}


LAYOUTS = tuple(
    f"b{steps}{phrases}{positions}" for positions in ("p", "hw", "fhw") for steps in ("", "s") for phrases in ("", "g")
)


def allocate(
    maps: Tensor,
    *,
    layout: str | None = None,
    strength: float = 1.0,
    over: str = "step",
    cap: float | None = None,
    step_signal: Tensor | None = None,
) -> Tensor:
    """Computes weights ``W = (1 - strength) + strength * maps / mean(maps)``, which are non-negative with mean one.

    With a mean of one the total weight of the update equals that of uniform weights; ``strength=0`` gives uniform
    weights exactly. This is STAR's allocation as reconstructed in docs/method.md (arXiv 2606.17979 publishes no
    formula).

    Args:
        maps: attention mass at each position, floating-point, non-negative.
        layout: the dimensions of ``maps``, one letter each: ``b`` for the batch, optionally ``s`` for steps, optionally
            ``g`` for phrases, and then the positions, either flat (``p``) or as a grid (``hw``, or ``fhw`` with the
            frames of a video). For example "bshw" means ``[B, Steps, h, w]`` and "bgp" means ``[B, G, P]``. Required
            unless maps are ``[B, P]``.
        strength: between 0 (uniform weights) and 1 (weights proportional to the map).
        over: the dimensions over which the weights of a sample (and phrase) have mean one. "step": the positions of
            each step, which allocates in space. "trajectory": positions and steps together, which allocates in space
            and time; the share of a step is then its attention mass.
        cap: largest weight, above 1. The excess is redistributed to positions below the cap in proportion to their
            weights, or evenly if all of them are zero.
        step_signal: replaces the attention mass as the share of a step with over="trajectory", such as
            :func:`total_variation`. ``[B, Steps]`` or, for each phrase, ``[B, Steps, G]``, floating-point,
            non-negative. A degenerate signal (see below) gives all steps the same share.

    Returns:
        Weights with the shape of ``maps``, float32 (float64 for float64 maps), without gradients in reverse and forward
        mode. A degenerate map, which sums to zero or has a negative or non-finite value, gives ones; other samples are
        not affected by it.

    Raises:
        TypeError, ValueError: wrong dtype, shape or option; the message names the argument.
    """
    layout = _check(maps, layout, strength, over, cap)
    if step_signal is not None:
        _check_signal(step_signal, maps, layout, over)
    library = _library(maps, step_signal)
    if library is None:
        return reference(maps, layout, strength, over, cap, step_signal)
    maps = maps.detach().float().contiguous()
    if step_signal is not None:
        step_signal = step_signal.detach().float().contiguous()
    weights = torch.empty_like(maps)
    library.allocate(
        maps,
        step_signal,
        "s" in layout,
        "g" in layout,
        over == "trajectory",
        float(strength),
        None if cap is None else float(cap),
        native.threads(),
        weights,
    )
    return weights


def reference(
    maps: Tensor, layout: str, strength: float, over: str, cap: float | None, step_signal: Tensor | None
) -> Tensor:
    """:func:`allocate` in PyTorch, for checked arguments."""
    dims = _MEANS[over]
    flat = _flat(maps.detach(), layout)
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()
    has_phrases = flat.ndim == 4
    if has_phrases:
        flat = flat.transpose(1, 2)  # [B, G, Steps, P]
    if step_signal is None:
        shares, _ = _shares(flat, dims)
    else:
        signal = step_signal.detach().to(flat.dtype)
        if has_phrases:
            signal = signal[:, None] if signal.ndim == 2 else signal.transpose(1, 2)
        shares = _shares(flat, (-1,))[0] * _shares(signal, (-1,))[0][..., None]
    weights = shares if strength == 1 else torch.lerp(torch.ones_like(shares), shares, strength)
    if cap is not None:
        weights = _cap(weights.flatten(-len(dims)), cap).view_as(weights)
    if has_phrases:
        weights = weights.transpose(1, 2)
    return weights if weights.ndim == maps.ndim else weights.reshape(maps.shape)


def total_variation(maps: Tensor, following: Tensor, *, layout: str | None = None) -> Tensor:
    """Total variation distance between each map and the map of the next step, both normalised to a sum of one.

    It is ``0.5 * sum(|M / sum(M) - M' / sum(M')|)``, between 0 and 1: the share of the attention that moves. A
    ``step_signal`` for :func:`allocate` that is not in the STAR paper; docs/experiment.md has measurements.

    Args:
        maps: floating-point, non-negative.
        following: the maps of the respective next step, with the same shape.
        layout: the dimensions of both as in :func:`allocate`, with steps, such as "bsp", "bsgp", "bshw" or "bsghw".

    Returns:
        ``[B, Steps]`` or ``[B, Steps, G]``, float32 (float64 for float64 maps), detached. 0 if one of the two maps is
        degenerate.

    Raises:
        TypeError, ValueError: wrong dtype or shape; the message names the argument.
    """
    for name, given in (("maps", maps), ("following", following)):
        _check_floating(name, given)
    layout = _check_layout(maps, layout, [known for known in LAYOUTS if "s" in known])
    if maps.shape != following.shape:
        raise ValueError(f"following must have the shape of maps, {list(maps.shape)}, got {list(following.shape)}")
    _check_device("following", following, maps)
    dtype = torch.float64 if torch.float64 in (maps.dtype, following.dtype) else torch.float32
    here, then = (_flat(given.detach(), layout).to(dtype) for given in (maps, following))
    (shares, good), (shares_then, good_then) = _shares(here, (-1,)), _shares(then, (-1,))
    apart = _mean((shares - shares_then).abs_(), (-1,))[..., 0] / 2
    for known in (good, good_then):
        if known is not None:
            apart = torch.where(known[..., 0], apart, 0.0)
    return apart


def _library(maps: Tensor, step_signal: Tensor | None) -> Any | None:
    """The compiled kernels, or None if PyTorch computes: for float64, on a GPU, and if a mode, trace or transform or a
    subclass of Tensor needs to see the call."""
    if torch.compiler.is_compiling() or WATCH.observed() or maps.dtype is torch.float64:
        return None
    for given in (maps, step_signal):
        if given is not None and (
            type(given) not in _PLAIN or not given.is_cpu or given.is_neg() or not given.data_ptr()
        ):
            return None
    return native.cpu()


def _flat(maps: Tensor, layout: str) -> Tensor:
    """The maps with all positions in the last dimension."""
    return maps if layout[-1] == "p" else maps.flatten(len(layout.rstrip("fhw")))


def _shares(values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Values divided by their mean; first divided by their maximum, so that nothing over- or underflows.

    Also returns which maps are good: all values are finite and non-negative, and at least one is positive. The shares
    of other maps are ones. None if all are good, which is tested for a few contiguous maps in host memory only: reading
    values of a GPU would synchronise.
    """
    peak, least = values.amax(dim=dims, keepdim=True), values.amin(dim=dims, keepdim=True)
    relative = values / peak
    shares = relative / _mean(relative, dims)
    if values.is_contiguous() and _all_good(peak, least):
        return shares, None
    good = (peak > 0) & (peak < math.inf) & (least >= 0)
    return torch.where(good, shares, 1.0), good


def _all_good(peak: Tensor, least: Tensor) -> bool:
    """Whether all maps are known to be good, given their largest and smallest values."""
    if torch.compiler.is_compiling() or WATCH.observed() or type(peak) is not Tensor or not peak.is_cpu:
        return False
    if peak.numel() > _FEW:
        return False
    peaks, leasts = peak.flatten().tolist(), least.flatten().tolist()
    return all([0 < p < math.inf for p in peaks]) and all([m >= 0 for m in leasts])


def _mean(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean over the last dimensions, with bits that do not depend on the number of threads.

    PyTorch splits a large sum of a single result between the threads of a CPU, but computes each of two results in one.
    """
    single = values.is_cpu and all(size == 1 for size in values.shape[: -len(dims)])
    if single and values.numel() >= _PARALLEL:
        return values.expand(2, *values.shape).mean(dim=dims, keepdim=True)[0]
    return values.mean(dim=dims, keepdim=True)


def _cap(weights: Tensor, cap: float) -> Tensor:
    """min(cap, c * weights) along the last dimension, with c such that the mean is one.

    If the k largest of n weights are at the cap, c = (n - k cap) / (sum of the other weights). The solution is the
    smallest k for which the next weight, times c, does not exceed the cap. c itself may overflow and is never computed.
    There is no loop and no host sync.
    """
    n = weights.shape[-1]
    ordered = weights.sort(dim=-1, descending=True).values
    rest = ordered.flip(-1).cumsum(dim=-1).flip(-1)  # [.., n]: sum of the weights from position k on
    left = n - cap * torch.arange(n, device=weights.device, dtype=weights.dtype)  # [n]: what those weights must sum to
    fits = (left * ordered <= cap * rest) & (left > 0) & (rest > 0)  # whether k is a solution
    first = fits.to(torch.uint8).argmax(dim=-1, keepdim=True)
    capped = (weights / rest.gather(-1, first) * left[first]).clamp(max=cap)
    # If all positive weights are at the cap, the rest is spread evenly over the zeros.
    positive = weights > 0
    count = positive.sum(dim=-1, keepdim=True, dtype=weights.dtype)
    shared = (n - cap * count) / (n - count).clamp(min=1)
    every = torch.where(positive, cap, shared.clamp(min=0))
    return torch.where(fits.any(dim=-1, keepdim=True), capped, every)


def _check_layout(maps: Tensor, layout: str | None, accepted: Sequence[str]) -> str:
    """The layout of maps, checked against their shape."""
    if layout is None and maps.ndim == 2 and "bp" in accepted:
        layout = "bp"
    if layout is None:
        fitting = [known for known in accepted if len(known) == maps.ndim]
        choice = f"one of {', '.join(map(repr, fitting))}" if fitting else "a letter for each dimension, such as 'bshw'"
        raise ValueError(f"layout must be given for maps of shape {list(maps.shape)}: {choice}")
    if layout not in accepted:
        raise ValueError(f"layout must be one of {', '.join(map(repr, accepted))}, got {layout!r}")
    if len(layout) != maps.ndim or 0 in maps.shape:
        sizes = ", ".join(_SIZES[letter] for letter in layout)
        hint = "; maps[:, 0] are the maps of the first phrase" if layout == "bhw" and maps.ndim == 4 else ""
        raise ValueError(
            f"maps must have shape [{sizes}] for layout {layout!r}, none of them 0, got {list(maps.shape)}{hint}"
        )
    return layout


def _check_floating(name: str, given: Tensor) -> None:
    if not isinstance(given, Tensor) or not given.is_floating_point():
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    check_dense(name, given)


def _check_signal(step_signal: Tensor, maps: Tensor, layout: str, over: str) -> None:
    _check_floating("step_signal", step_signal)
    if over != "trajectory":
        raise ValueError(f"step_signal must be None unless over='trajectory', got a signal with over={over!r}")
    accepted = [list(maps.shape[:2]), list(maps.shape[:3])][: 1 + ("g" in layout)]
    if list(step_signal.shape) not in accepted:
        shapes = " or ".join(map(str, accepted))
        raise ValueError(
            f"step_signal must have shape {shapes} for maps {list(maps.shape)}, got {list(step_signal.shape)}"
        )
    _check_device("step_signal", step_signal, maps)


def _check_device(name: str, given: Tensor, maps: Tensor) -> None:
    if given.device != maps.device:
        raise ValueError(f"{name} must be on the device of maps, {maps.device}, got {given.device}")


def _check(maps: Tensor, layout: str | None, strength: float, over: str, cap: float | None) -> str:
    _check_floating("maps", maps)
    if not isinstance(over, str) or over not in _MEANS:
        raise ValueError(f"over must be 'step' or 'trajectory', got {over!r}")
    layout = _check_layout(maps, layout, LAYOUTS)
    if over == "trajectory" and "s" not in layout:
        raise ValueError(
            f"layout must include steps, as in 'bsp' or 'bshw', for over='trajectory', got {layout!r} for maps of "
            f"shape {list(maps.shape)}"
        )
    check_number("strength", strength)
    if cap is not None:
        check_number("cap", cap)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, got {strength}")
    if cap is not None and not 1 < cap < float("inf"):
        raise ValueError(f"cap must be finite and above 1, got {cap}")
    return layout
