"""How far the log-probabilities of two models or two implementations differ: rollout and training, old and trained."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from star_kernels.integrations.layout import check_shape


class Agreement(NamedTuple):
    """The absolute difference of two log-probabilities, detached; reading a value of a GPU synchronises."""

    mean: Tensor
    max: Tensor

    def metrics(self, name: str) -> dict[str, Tensor]:
        """``{name}/mean`` and ``{name}/max``, and for values of several steps ``{name}/step_{i}/mean`` and so on."""
        if self.mean.ndim == 0:
            return {f"{name}/mean": self.mean, f"{name}/max": self.max}
        return {
            f"{name}/step_{i}/{kind}": value
            for kind, values in self._asdict().items()
            for i, value in enumerate(values.unbind())
        }


def log_prob_agreement(log_prob: Tensor, other: Tensor, *, by_step: bool = False) -> Agreement:
    """The mean and the largest ``|log p - log p'|``.

    In the first update of a rollout the weights are those of the rollout, so the difference from its log-probabilities
    is what another dtype, attention backend or implementation costs. Log-probabilities of locations show where.

    Args:
        log_prob, other: of each sample or of each location, ``[B]`` or ``[B, *locations]``; if by_step,
            ``[B, Steps]`` or ``[B, Steps, *locations]``.
        by_step: whether the second dimension is the step; the results are then ``[Steps]``.

    Raises:
        ValueError: the shapes differ.
    """
    check_shape("other", other, "log_prob", log_prob)
    difference = (log_prob.detach().float() - other.detach().float()).abs()
    rows = difference.transpose(0, 1).flatten(1) if by_step else difference.reshape(1, -1)
    mean, largest = rows.mean(dim=1), rows.amax(dim=1)
    return Agreement(mean, largest) if by_step else Agreement(mean[0], largest[0])
