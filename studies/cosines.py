"""Cosines between gradients of independent batches, their jackknife errors, and effective-sample multiples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def compared(stored: dict[str, dict[int, Tensor]]) -> dict[str, dict[str, Any]]:
    """The cosines of each allocation (see studies/agreement.py), from its gradients by batch."""
    scalar = stored["scalar"]
    scale = adam_scale(scalar.values())
    found = {}
    for name, vectors in stored.items():
        if len(vectors) < 4:  # a step that is trained in few batches
            continue
        stacked = torch.stack(list(vectors.values()))
        found[name] = agreement(stacked)
        found[name]["scaled"] = agreement(stacked, scale=scale)
        others = torch.stack([scalar[n] for n in vectors])
        found[name]["along scalar"] = agreement(stacked, others, scale=scale)
        found[name]["step"] = agreement(stacked, others, scale=adam_scale(stacked), scale_others=False)
    return found


def adam_scale(vectors: Iterable[Tensor]) -> Tensor:
    """The reciprocal of the root mean square of each entry over vectors ``[D]``."""
    squares, count = torch.zeros(()), 0
    for vector in vectors:
        squares, count = squares + vector.float().square(), count + 1
    return (squares / count).sqrt().clamp(min=1e-12).reciprocal()


def cosines(arm: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cosines of an allocation by kind. The kind of the unscaled gradients is ""."""
    return {"": arm, **{kind: arm[kind] for kind in ("scaled", "along scalar", "step") if kind in arm}}


def agreement(
    vectors: Tensor,
    others: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    scale_others: bool = True,
) -> dict[str, Any]:
    """Mean cosine between rows of ``vectors`` and other rows of ``others``, with its jackknife standard error.

    Args:
        vectors: ``[N, D]``.
        others: ``[N, D]``. Default: ``vectors``.
        scale: ``[D]``, a factor for every entry.
        scale_others: whether ``scale`` also applies to ``others``.

    Returns:
        ``cosine``, its ``error``, and ``without``, the mean cosines with each row left out.
    """
    n, size = vectors.shape
    inner, squares = torch.zeros(n, n), torch.zeros(2, n)
    for start in range(0, size, 1 << 18):
        chosen = slice(start, start + (1 << 18))
        factor = 1.0 if scale is None else scale[chosen]
        left = vectors[:, chosen].float() * factor
        right = left if others is None else others[:, chosen].float() * (factor if scale_others else 1.0)
        inner += left @ right.T
        squares += torch.stack([left.square().sum(dim=1), right.square().sum(dim=1)])
    norms = squares.sqrt()
    cosines = (inner / (norms[0, :, None] * norms[1])).fill_diagonal_(0)
    total = cosines.sum().item()
    own = cosines.sum(dim=0) + cosines.sum(dim=1)
    without = [(total - o) / ((n - 1) * (n - 2)) for o in own.tolist()]
    return {"cosine": total / (n * (n - 1)), "error": jackknife(without), "without": [round(w, 7) for w in without]}


def jackknife(without: Sequence[float]) -> float:
    """Jackknife standard error from the n estimates that each leave out one of n observations."""
    n, mean = len(without), sum(without) / len(without)
    return math.sqrt((n - 1) / n * sum((w - mean) ** 2 for w in without))


@dataclass(frozen=True)
class Multiple:
    """The effective-sample multiple of an allocation relative to scalar advantages, with a 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        return math.isfinite(self.value)

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def multiple(arm: dict[str, Any], baseline: dict[str, Any]) -> Multiple:
    """Ratio of ``c / (1 - c)``, which is proportional to the number of samples. NaN if a cosine is not positive."""

    def odds(c: float) -> float:
        return c / (1 - c)

    if arm["cosine"] <= 0 or baseline["cosine"] <= 0:
        return Multiple(math.nan, math.nan, math.nan)
    value = odds(arm["cosine"]) / odds(baseline["cosine"])
    error = jackknife([odds(a) / odds(b) for a, b in zip(arm["without"], baseline["without"], strict=True)])
    return Multiple(value, value - 1.96 * error, value + 1.96 * error)
