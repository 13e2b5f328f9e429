"""Attention maps to weights of mean one: where, and when, the advantage of a rollout acts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from star_kernels.checks import check_dense, check_number

_MEANS = {"step": (-1,), "trajectory": (-2, -1)}
_SIZES = {"b": "B", "s": "Steps", "g": "G", "p": "P", "f": "f", "h": "h", "w": "w"}


LAYOUTS = tuple(
    f"b{steps}{groups}{positions}" for positions in ("p", "hw", "fhw") for steps in ("", "s") for groups in ("", "g")
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
    """Weights ``W = (1 - strength) + strength * maps / mean(maps)``, not negative and of mean one.

    The mean of one keeps the size of the update that of uniform weights, and ``strength=0`` gives exactly those.
    STAR's allocation as reconstructed in docs/method.md (arXiv 2606.17979 publishes no formula).

    Args:
        maps: floating-point, not negative: attention mass at positions. Each group of tokens has a mean of one by
            itself.
        layout: what the dimensions of maps are, a letter each: ``b`` the batch; then, where there are any, ``s`` steps
            and ``g`` groups of tokens; then the positions, flat as ``p`` or on a grid as ``hw`` (``fhw`` for the frames
            of a video). So "bshw" is ``[B, Steps, h, w]`` and "bgp" is ``[B, G, P]``. Required unless maps are
            ``[B, P]``.
        strength: from 0 (uniform) to 1 (in proportion to the map).
        over: "step": mean one over the positions of each step (space only); "trajectory": over positions and steps
            (of each group) together, so that a step's share is its own mass (space and time).
        cap: largest weight, above 1; what it takes away is given to the positions below it, in proportion
            (in equal parts where they all have zero).
        step_signal: with over="trajectory", a step's share instead of its own mass: ``[B, Steps]`` or, of each group,
            ``[B, Steps, G]``, floating-point, not negative, such as :func:`total_variation`. A degenerate signal, as of
            a map, gives all steps the same share.

    Returns:
        Weights of the shape of maps, float32 (float64 for float64 maps), detached (in forward mode, too). A degenerate
        map, with a sum of zero or anything that is not finite or negative in it, gives ones; it never reaches another
        sample.

    Raises:
        TypeError, ValueError: wrong dtype, shape or option; the message names the argument.
    """
    layout = _check(maps, layout, strength, over, cap)
    if step_signal is not None:
        _check_signal(step_signal, maps, layout, over)
    dims = _MEANS[over]
    flat = _flat(maps.detach(), layout)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    grouped = flat.ndim == 4
    if grouped:
        flat = flat.transpose(1, 2)  # [B, G, Steps, P]
    if step_signal is None:
        shares = _shares(flat, dims)
    else:
        signal = step_signal.detach().to(flat.dtype)
        if grouped:
            signal = signal[:, None] if signal.ndim == 2 else signal.transpose(1, 2)
        shares = _shares(flat, (-1,)) * _shares(signal, (-1,))[..., None]
    weights = torch.lerp(torch.ones_like(shares), shares, strength)
    if cap is not None:
        weights = _cap(weights.flatten(-len(dims)), cap).view_as(weights)
    return (weights.transpose(1, 2) if grouped else weights).reshape(maps.shape)


def total_variation(maps: Tensor, following: Tensor, *, layout: str | None = None) -> Tensor:
    """How much of each map is elsewhere in the step after: half the sum of ``|M / sum(M) - M' / sum(M')|``, in 0..1.

    A signal for the steps of :func:`allocate` (ours; what it is worth: docs/experiment.md).

    Args:
        maps: floating-point, not negative.
        following: the maps of the step after each, of the same shape.
        layout: what the dimensions of both are, as for :func:`allocate`, with steps: "bsp", "bsgp", "bshw", "bsghw".

    Returns:
        ``[B, Steps]`` or ``[B, Steps, G]``, float32 (float64 for float64 maps), detached; 0 where one of the two maps
        is degenerate.

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
    apart = _mean((_shares(here, (-1,)) - _shares(then, (-1,))).abs(), (-1,))[..., 0] / 2
    return torch.where(_good(here, (-1,))[..., 0] & _good(then, (-1,))[..., 0], apart, 0.0)


def _flat(maps: Tensor, layout: str) -> Tensor:
    """The maps with their positions in one dimension, the last."""
    return maps.flatten(len(layout.rstrip("pfhw")))


def _shares(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Values over their mean, scaled by the largest first: neither tiny nor huge ones leave the range of the dtype."""
    relative = values / values.amax(dim=dims, keepdim=True)
    return torch.where(_good(values, dims), relative / _mean(relative, dims), 1.0)


def _mean(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean over the last dimensions, with bits that do not depend on the number of threads.

    PyTorch shares the sum of a single result out among the threads of a CPU, but one of two results goes to one thread.
    """
    if values.device.type == "cpu" and all(size == 1 for size in values.shape[: -len(dims)]):
        return values.expand(2, *values.shape).mean(dim=dims, keepdim=True)[0]
    return values.mean(dim=dims, keepdim=True)


def _good(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Whether all are finite, none negative, and one above zero."""
    peak = values.amax(dim=dims, keepdim=True)
    return (peak > 0) & peak.isfinite() & (values.amin(dim=dims, keepdim=True) >= 0)


def _cap(weights: Tensor, cap: float) -> Tensor:
    """min(cap, c * weights) along the last dimension, with c such that the mean is one.

    With the weights in descending order and the k largest at the cap, c = (n - k cap) / (sum of the rest); the right k
    is the first whose next weight stays within the cap. c itself, which has no bounds, is never computed. No loop, no
    wait for the device.
    """
    n = weights.shape[-1]
    ordered = weights.sort(dim=-1, descending=True).values
    rest = ordered.flip(-1).cumsum(dim=-1).flip(-1)  # of the weights from position k on
    left = n - cap * torch.arange(n, device=weights.device, dtype=weights.dtype)  # for them
    fits = (left * ordered <= cap * rest) & (left > 0) & (rest > 0)  # capping the k largest leaves the next within it
    first = fits.to(torch.uint8).argmax(dim=-1, keepdim=True)
    capped = (weights / rest.gather(-1, first) * left[first]).clamp(max=cap)
    # Where all mass lies on positions at the cap, zeros share what is left in equal parts.
    positive = weights > 0
    count = positive.sum(dim=-1, keepdim=True, dtype=weights.dtype)
    shared = (n - cap * count) / (n - count).clamp(min=1)
    every = torch.where(positive, cap, shared.clamp(min=0))
    return torch.where(fits.any(dim=-1, keepdim=True), capped, every)


def _check_layout(maps: Tensor, layout: str | None, accepted: Sequence[str]) -> str:
    """The layout of maps, which fits their shape."""
    fitting = [known for known in accepted if len(known) == maps.ndim]
    choice = f"one of {', '.join(map(repr, fitting))}" if fitting else "a letter for each dimension, such as 'bshw'"
    if layout is None and maps.ndim == 2 and "bp" in accepted:
        layout = "bp"
    if layout is None:
        raise ValueError(f"layout must be given where maps have shape {list(maps.shape)}: {choice}")
    if layout not in accepted:
        raise ValueError(f"layout must be one of {', '.join(map(repr, accepted))}, got {layout!r}")
    if len(layout) != maps.ndim or 0 in maps.shape:
        sizes = ", ".join(_SIZES[letter] for letter in layout)
        raise ValueError(
            f"maps must have shape [{sizes}] for layout {layout!r}, none of them 0, got {list(maps.shape)}"
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
        raise ValueError(f"step_signal must be None unless over='trajectory', got it with over={over!r}")
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
            f"layout must have steps, as 'bsp' and 'bshw', for over='trajectory', got {layout!r} for {list(maps.shape)}"
        )
    check_number("strength", strength)
    if cap is not None:
        check_number("cap", cap)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie between 0 and 1, got {strength}")
    if cap is not None and not 1 < cap < float("inf"):
        raise ValueError(f"cap must be finite and above 1, got {cap}")
    return layout
