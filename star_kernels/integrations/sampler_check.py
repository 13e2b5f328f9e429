"""Whether log-probabilities that a trainer computed are those of the sampler that its means are used with."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.integrations.deferred import DeferredChecks
from star_kernels.integrations.means import SAMPLERS, mean_transition

TOLERANCE = 1e-3  # relative; float32 sums in another order differ by about 1e-6


class SamplerCheck:
    """Compares log-probabilities with those of a sampler, without a wait for the device.

    Four numbers of each sample are compared at a later call, see :class:`DeferredChecks`.
    """

    def __init__(self) -> None:
        self._checks = DeferredChecks()

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
        self._checks.add(numbers, lambda arrived: _judged(arrived, sde_type, name))

    def settle(self) -> None:
        """Compares what has arrived.

        Raises:
            ValueError: the log-probabilities are not those of the sampler; the message names it.
        """
        self._checks.settle()


def _judged(numbers: Tensor, sde_type: str, name: str) -> str | None:
    """The message about log-probabilities that are not the sampler's.

    Args:
        numbers: ``[4, B]``: log_prob, the mean square of the noise, std_dev_t, sqrt_dt.
    """
    deviation = _deviation(numbers, sde_type)
    if deviation <= TOLERANCE:
        return None
    fitting = [each for each in SAMPLERS if _deviation(numbers, each) <= TOLERANCE]
    known = ", ".join(SAMPLERS)
    found = (
        f"they are those of {fitting[0]!r}"
        if fitting
        else f"they are those of none of {known}, or were computed for another latent than prev_sample"
    )
    return (
        f"sde_type must be the sampler of {name}, got {sde_type!r}, whose density of the means differs from {name} by "
        f"up to {deviation:.1%}; {found}"
    )


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
