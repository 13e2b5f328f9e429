"""Terms with a zero advantage or weight contribute nothing, even if their ratio overflows; a NaN stays visible."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import flow_matching, weighted_policy_loss

OVERFLOW = 100.0  # a log-ratio whose exponential is infinite in float32
ratios = pytest.mark.parametrize("ratio", ["sample", "location"])


class Case:
    """One packed sample of four locations whose log-ratios are all infinite in float32."""

    def __init__(self, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        latents = [torch.randn(1, 2, 4, generator=generator).to(device) for _ in range(3)]
        self.model_output, self.sample, self.prev_sample = latents
        self.transition = flow_matching(torch.tensor([0.5])).to(device)
        self.old = -(self.prev_sample - self.model_output).square().mean(dim=1) - OVERFLOW

    def run(self, backend: str, advantages: list[Any], **options: Any) -> tuple[float, Tensor]:
        """Loss and gradient."""
        device = self.old.device
        leaf = self.model_output.clone().requires_grad_()
        given = {name: torch.tensor(v).to(device) if isinstance(v, list) else v for name, v in options.items()}
        loss, _ = weighted_policy_loss(
            leaf, self.sample, self.prev_sample, self.old, torch.tensor(advantages).to(device), self.transition,
            backend=backend, **given,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), gradient


ONES = [1.0, 1.0, 1.0, 1.0]
ZERO_ADVANTAGES: dict[str, tuple[list[Any], dict[str, Any], float]] = {  # advantages, options, the loss
    "sample": ([0.0], {}, 0.0),
    "one phrase": ([[0.0]], {"weights": [[ONES]]}, 0.0),
    "two phrases": ([[1.0, 0.0]], {"weights": [[ONES, ONES]]}, -1.0001),
    "three phrases": ([[0.0, 1.0, 0.0]], {"weights": [[ONES, ONES, ONES]]}, -1.0001),
    "dense": ([[1.0, 0.0, 1.0, 1.0]], {}, -1.0001 * 3 / 4),
    "dense zeros": ([[0.0, 0.0, 0.0, 0.0]], {}, 0.0),
}
ZERO_WEIGHTS: dict[str, tuple[list[Any], list[Any]]] = {  # advantages, weights
    "sample": ([1.0], [[0.0, 0.0, 0.0, 4.0]]),
    "phrases": ([[1.0, -1.0]], [[ONES, [0.0] * 4]]),
    "dense": ([[0.0, -1.0, 0.0, 1.0]], [[1.0, 0.0, 1.0, 2.0]]),
}
NOT_A_NUMBER: dict[str, tuple[list[Any], dict[str, Any]]] = {  # advantages, options
    "sample": ([1.0], {}),
    "zero": ([0.0], {}),
    "phrases": ([[1.0, 1.0]], {"weights": [[[0.0, 2.0, 1.0, 1.0]] * 2]}),
    "zero phrases": ([[0.0, 0.0]], {"weights": [[ONES, ONES]]}),
    "dense": ([[0.0, 1.0, 1.0, 1.0]], {}),
}


@ratios
@pytest.mark.parametrize(("advantages", "options", "same"), ZERO_ADVANTAGES.values(), ids=ZERO_ADVANTAGES)
def test_an_advantage_of_zero_contributes_nothing(
    advantages: list[Any], options: dict[str, Any], same: float, ratio: str, policy_backend: tuple[str, str]
) -> None:
    loss, gradient = Case(policy_backend[1]).run(policy_backend[0], advantages, ratio=ratio, **options)
    assert loss == pytest.approx(same, rel=1e-6)
    assert gradient.eq(0).all()  # positive advantages are clipped


@pytest.mark.parametrize(("advantages", "weights"), ZERO_WEIGHTS.values(), ids=ZERO_WEIGHTS)
def test_a_weight_of_zero_at_a_location_contributes_nothing(
    advantages: list[Any], weights: list[Any], policy_backend: tuple[str, str]
) -> None:
    loss, gradient = Case(policy_backend[1]).run(policy_backend[0], advantages, ratio="location", weights=weights)
    assert math.isfinite(loss)
    assert gradient.eq(0).all()


@ratios
@pytest.mark.parametrize(("advantages", "options"), NOT_A_NUMBER.values(), ids=NOT_A_NUMBER)
def test_a_ratio_that_is_not_a_number_stays_visible(
    advantages: list[Any], options: dict[str, Any], ratio: str, policy_backend: tuple[str, str]
) -> None:
    case = Case(policy_backend[1])
    case.old[:, 0] = math.nan
    loss, _ = case.run(policy_backend[0], advantages, ratio=ratio, **options)
    assert math.isnan(loss)
