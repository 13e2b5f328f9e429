"""Whether log-probabilities that a trainer computed are those of the sampler that its means are used with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from star_kernels.integrations.means import SAMPLERS, mean_transition

TOLERANCE = 1e-3  # relative; float32 sums in another order differ by about 1e-6


class _Pending(NamedTuple):
    numbers: Tensor  # [4, B] in host memory: log_prob, the mean square, std_dev_t, sqrt_dt
    copied: Any  # the event after the copy; None if it is complete
    sde_type: str
    name: str


class SamplerCheck:
    """Compares log-probabilities with those of a sampler, without a wait for the device.

    Four numbers of each sample are copied to host memory asynchronously and compared at the next :meth:`settle`, which
    leaves those that the device has not computed yet to the one after. Tensors on a CPU are compared at once.
    """

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def add(
        self,
        log_prob: Tensor,
        prev_sample_mean: Tensor,
        prev_sample: Tensor,
        std_dev_t: Tensor,
        sqrt_dt: Tensor,
        *,
        sde_type: str,
        name: str = "log_probs",
    ) -> None:
        """Records a comparison, and settles those that are ready.

        Args:
            log_prob: the trainer's log-probability, ``[B]``, with or without the normaliser of the Gaussian.
            prev_sample_mean, prev_sample: ``[B, ...]``.
            std_dev_t, sqrt_dt, sde_type: see :func:`star_kernels.integrations.means.mean_transition`.
            name: of the log-probability, for the message.

        Raises:
            ValueError: see :meth:`settle`.
        """
        with torch.no_grad():
            squares = (prev_sample.float() - prev_sample_mean.float()).square().flatten(1).mean(dim=1)
            rows = (log_prob, squares, std_dev_t, sqrt_dt)
            numbers = torch.stack([row.detach().float().reshape(-1).expand(len(squares)) for row in rows])
        copied = None
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_Pending(numbers, copied, sde_type, name))
        self.settle()

    def settle(self) -> None:
        """Compares what has arrived.

        Raises:
            ValueError: the log-probabilities are not those of the sampler; the message names it.
        """
        while self._pending and (self._pending[0].copied is None or self._pending[0].copied.query()):
            pending = self._pending.pop(0)
            deviation = _deviation(pending.numbers, pending.sde_type)
            if deviation > TOLERANCE:
                self._pending.clear()
                raise ValueError(_explained(pending, deviation))


def _deviation(numbers: Tensor, sde_type: str) -> float:
    """The largest relative difference from the density of a sampler, with or without its normaliser.

    Samples for which it is NaN, as in a step without noise, do not count.
    """
    log_prob, squares, std_dev_t, sqrt_dt = numbers.double()
    transition = mean_transition(std_dev_t, sqrt_dt, sde_type=sde_type)
    exponent, offset = transition.scale.double() * squares, transition.offset.double()
    plain = (log_prob + exponent).abs() / exponent
    normalised = (log_prob + exponent - offset).abs() / (exponent + offset.abs())
    infinity = float("inf")
    return min(float(torch.nan_to_num(found, nan=0.0, posinf=infinity).amax()) for found in (plain, normalised))


def _explained(pending: _Pending, deviation: float) -> str:
    fitting = [name for name in SAMPLERS if _deviation(pending.numbers, name) <= TOLERANCE]
    known = ", ".join(SAMPLERS)
    found = (
        f"they are those of {fitting[0]!r}"
        if fitting
        else f"they are those of none of {known}, or were computed for another latent than prev_sample"
    )
    return (
        f"sde_type must be the sampler of {pending.name}, got {pending.sde_type!r}, whose density of the means differs "
        f"from {pending.name} by up to {deviation:.1%}; {found}"
    )
