"""Attention maps to weights of mean one: where, and when, the advantage of a rollout acts."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.checks import check_number

_MEANS = {"step": (-1,), "trajectory": (-2, -1)}


def allocate(maps: Tensor, *, strength: float = 1.0, over: str = "step", cap: float | None = None) -> Tensor:
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

    Returns:
        Weights of the shape of maps, float32 (float64 for float64 maps), detached. A degenerate map, with a sum of
        zero or anything that is not finite or negative in it, gives ones; it never reaches another sample.

    Raises:
        TypeError, ValueError: wrong dtype, shape or option; the message names the argument.
    """
    _check(maps, strength, over, cap)
    dims = _MEANS[over]
    maps = maps.detach()
    maps = maps if maps.dtype == torch.float64 else maps.float()
    grouped = maps.ndim == 4
    if grouped:
        maps = maps.transpose(1, 2)  # [B, G, Steps, P]
    # Scaled by the largest entry first: neither tiny nor huge maps leave the range of the dtype.
    peak = maps.amax(dim=dims, keepdim=True)
    relative = maps / peak
    mean = relative.mean(dim=dims, keepdim=True)
    good = (mean > 0) & mean.isfinite() & (maps.amin(dim=dims, keepdim=True) >= 0) & peak.isfinite()
    shares = torch.where(good, relative / mean, 1.0)
    weights = torch.lerp(torch.ones_like(shares), shares, strength)
    if cap is not None:
        weights = _cap(weights.flatten(-len(dims)), cap).view_as(weights)
    return weights.transpose(1, 2) if grouped else weights


def _cap(weights: Tensor, cap: float) -> Tensor:
    """min(cap, c * weights) along the last dimension, with c such that the mean is one.

    With the weights in descending order and the k largest at the cap, c = (n - k cap) / (sum of the rest); the right k
    is the first whose next weight stays within the cap. No loop, no wait for the device.
    """
    n = weights.shape[-1]
    ordered = weights.sort(dim=-1, descending=True).values
    rest = ordered.flip(-1).cumsum(dim=-1).flip(-1)  # of the weights from position k on
    factor = (n - cap * torch.arange(n, device=weights.device, dtype=weights.dtype)) / rest
    fits = (factor * ordered <= cap) & (factor > 0)  # capping the k largest leaves the next one within the cap
    first = fits.to(torch.uint8).argmax(dim=-1, keepdim=True)
    possible = fits.any(dim=-1, keepdim=True)
    every = torch.where(weights > 0, torch.full_like(weights, cap), 0.0)
    capped = torch.where(possible, weights * factor.gather(-1, first), every).clamp(max=cap)
    # Where all mass lies on positions at the cap, zeros share what is left in equal parts.
    below = capped < cap
    left = (n - capped.sum(dim=-1, keepdim=True)) / below.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(below & ~possible, capped + left, capped)


def _check(maps: Tensor, strength: float, over: str, cap: float | None) -> None:
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        got = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise TypeError(f"maps must be a floating-point tensor, got {got}")
    if not isinstance(over, str) or over not in _MEANS:
        raise ValueError(f"over must be 'step' or 'trajectory', got {over!r}")
    if maps.ndim not in (2, 3, 4) or 0 in maps.shape:
        raise ValueError(
            f"maps must have shape [B, P], [B, Steps, P] or [B, Steps, G, P], none of them 0, got {list(maps.shape)}"
        )
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
