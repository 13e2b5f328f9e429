"""Attention maps to weights of mean one: where, and when, the advantage of a rollout acts."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.checks import check_number

_MEANS = {"step": (-1,), "trajectory": (-2, -1)}


def allocate(
    maps: Tensor,
    *,
    strength: float = 1.0,
    over: str = "step",
    cap: float | None = None,
    step_signal: Tensor | None = None,
) -> Tensor:
    """Weights ``W = (1 - strength) + strength * maps / mean(maps)``, not negative and of mean one.

    The mean of one keeps the size of the update that of uniform weights, and ``strength=0`` gives exactly those.
    STAR's allocation as reconstructed in docs/method.md (arXiv 2606.17979 publishes no formula).

    Args:
        maps: ``[B, P]``, ``[B, Steps, P]`` or, with groups of tokens, ``[B, Steps, G, P]``, floating-point, not
            negative: attention mass at P positions. Each group has a mean of one by itself; groups of one step,
            ``[B, G, P]``, are served as steps are by over="step".
        strength: from 0 (uniform) to 1 (in proportion to the map).
        over: "step": mean one over the positions of each step (space only); "trajectory": over positions and steps
            (of each group) together, so that a step's share is its own mass (space and time).
        cap: largest weight, above 1; what it takes away is given to the positions below it, in proportion
            (in equal parts where they all have zero).
        step_signal: with over="trajectory", a step's share instead of its own mass: ``[B, Steps]`` or, of each group,
            ``[B, Steps, G]``, floating-point, not negative, such as :func:`map_change`. A degenerate signal, as of a
            map, gives all steps the same share.

    Returns:
        Weights of the shape of maps, float32 (float64 for float64 maps), detached. A degenerate map, with a sum of
        zero or anything that is not finite or negative in it, gives ones; it never reaches another sample.

    Raises:
        TypeError, ValueError: wrong dtype, shape or option; the message names the argument.
    """
    _check(maps, strength, over, cap)
    if step_signal is not None:
        _check_signal(step_signal, maps, over)
    dims = _MEANS[over]
    maps = maps.detach()
    maps = maps if maps.dtype == torch.float64 else maps.float()
    grouped = maps.ndim == 4
    if grouped:
        maps = maps.transpose(1, 2)  # [B, G, Steps, P]
    if step_signal is None:
        shares = _shares(maps, dims)
    else:
        signal = step_signal.detach().to(maps.dtype)
        if grouped:
            signal = signal[:, None] if signal.ndim == 2 else signal.transpose(1, 2)
        shares = _shares(maps, (-1,)) * _shares(signal, (-1,))[..., None]
    weights = torch.lerp(torch.ones_like(shares), shares, strength)
    if cap is not None:
        weights = _cap(weights.flatten(-len(dims)), cap).view_as(weights)
    return weights.transpose(1, 2) if grouped else weights


def map_change(maps: Tensor, following: Tensor) -> Tensor:
    """How much of each map is elsewhere in the step after: half the sum of ``|M / sum(M) - M' / sum(M')|``, in 0..1.

    A signal for the steps of :func:`allocate` (ours; what it is worth: docs/experiment.md).

    Args:
        maps: ``[B, Steps, P]`` or ``[B, Steps, G, P]``, floating-point, not negative.
        following: the maps of the step after each, of the same shape.

    Returns:
        ``[B, Steps]`` or ``[B, Steps, G]``, float32 (float64 for float64 maps), detached; 0 where one of the two maps
        is degenerate.

    Raises:
        TypeError, ValueError: wrong dtype or shape; the message names the argument.
    """
    for name, given in (("maps", maps), ("following", following)):
        _check_maps(name, given)
    if maps.ndim == 2 or maps.shape != following.shape:
        raise ValueError(
            "maps and following must have one shape, [B, Steps, P] or [B, Steps, G, P], "
            f"got {list(maps.shape)} and {list(following.shape)}"
        )
    _check_device("following", following, maps)
    dtype = torch.float64 if torch.float64 in (maps.dtype, following.dtype) else torch.float32
    here, then = maps.detach().to(dtype), following.detach().to(dtype)
    apart = (_shares(here, (-1,)) - _shares(then, (-1,))).abs().mean(dim=-1) / 2
    return torch.where(_good(here, (-1,))[..., 0] & _good(then, (-1,))[..., 0], apart, 0.0)


def _shares(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Values over their mean, scaled by the largest first: neither tiny nor huge ones leave the range of the dtype."""
    relative = values / values.amax(dim=dims, keepdim=True)
    return torch.where(_good(values, dims), relative / relative.mean(dim=dims, keepdim=True), 1.0)


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


def _check_maps(name: str, maps: Tensor) -> None:
    _check_floating(name, maps)
    if maps.ndim not in (2, 3, 4) or 0 in maps.shape:
        raise ValueError(
            f"{name} must have shape [B, P], [B, Steps, P] or [B, Steps, G, P], none of them 0, got {list(maps.shape)}"
        )


def _check_floating(name: str, given: Tensor) -> None:
    if not isinstance(given, Tensor) or not given.is_floating_point():
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")


def _check_signal(step_signal: Tensor, maps: Tensor, over: str) -> None:
    _check_floating("step_signal", step_signal)
    if over != "trajectory":
        raise ValueError(f"step_signal must be None unless over='trajectory', got it with over={over!r}")
    accepted = [list(maps.shape[:2])] if maps.ndim == 3 else [list(maps.shape[:2]), list(maps.shape[:3])]
    if list(step_signal.shape) not in accepted:
        shapes = " or ".join(map(str, accepted))
        raise ValueError(
            f"step_signal must have shape {shapes} for maps {list(maps.shape)}, got {list(step_signal.shape)}"
        )
    _check_device("step_signal", step_signal, maps)


def _check_device(name: str, given: Tensor, maps: Tensor) -> None:
    if given.device != maps.device:
        raise ValueError(f"{name} must be on the device of maps, {maps.device}, got {given.device}")


def _check(maps: Tensor, strength: float, over: str, cap: float | None) -> None:
    _check_floating("maps", maps)
    if not isinstance(over, str) or over not in _MEANS:
        raise ValueError(f"over must be 'step' or 'trajectory', got {over!r}")
    _check_maps("maps", maps)
    if over == "trajectory" and maps.ndim == 2:
        raise ValueError(
            f"maps must have shape [B, Steps, P] or [B, Steps, G, P] for over='trajectory', got {list(maps.shape)}"
        )
    check_number("strength", strength)
    if cap is not None:
        check_number("cap", cap)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie between 0 and 1, got {strength}")
    if cap is not None and not 1 < cap < float("inf"):
        raise ValueError(f"cap must be finite and above 1, got {cap}")
