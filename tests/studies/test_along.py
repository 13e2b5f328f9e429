"""studies.along: weights, derivatives along a direction, and statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from star_trainer.config import Config
from star_trainer.policy import Policy
from star_trainer.prompts import load_prompts
from studies import along, efficiency


def _unit(progress: dict[str, list[float]], sizes: list[list[list[float]]]) -> dict[str, Any]:
    """A unit whose progress is half from each class."""
    return {
        "batches": [{}] * len(progress["plain"]),
        "progress": {n: {kind: [[v / 2] for v in own] for kind in along.CLASSES} for n, own in progress.items()},
        "atoms": [f"{name}, {kind}" for name in progress for kind in along.CLASSES],
        "sizes": [{efficiency.WHOLE: products} for products in sizes],
    }


def test_efficiency_is_progress_per_length_relative_to_plain() -> None:
    lengths = torch.tensor([1.0, 1.0, 2.0, 2.0]).square().diag().tolist()  # "map" takes steps twice as long
    unit = _unit({"plain": [1.0, 2.0, 3.0], "map": [3.0, 6.0, 9.0]}, [lengths] * 2)
    found = efficiency.efficiency(unit, "map")
    assert found.value == pytest.approx(1.5)
    assert found.half_width == pytest.approx(0.0, abs=1e-6)  # the ratio is the same in all batches
    assert efficiency.gain(unit, "map", "plain").value == pytest.approx(0.5)
    noisy = _unit({"plain": [1.0, 2.0, 3.0], "map": [9.0, 6.0, 3.0]}, [lengths] * 2)
    assert efficiency.efficiency(noisy, "map").half_width > 0.5


def test_a_mixed_allocation_has_the_map_where_all_is_found_and_another_where_an_object_is_missing() -> None:
    unit = _unit({"plain": [1.0, 1.0], "map": [4.0, 4.0]}, [torch.eye(4).tolist()] * 2)
    # Half of the progress at four times the rate; each of four orthogonal parts has a length of one.
    assert efficiency.efficiency(unit, "plain where missing").value == pytest.approx(2.5)
    assert efficiency.efficiency(unit, "plain where missing", ["found"]).value == pytest.approx(4.0)
    assert efficiency.efficiency(unit, "plain where missing", ["missing"]).value == pytest.approx(1.0)


def test_maps_of_a_group_are_means_over_it_or_over_its_best_samples() -> None:
    maps = torch.rand(6, 2, 4)
    mean = along._of_group(maps, torch.ones(6), 3)
    torch.testing.assert_close(mean[3:], maps[3:].mean(dim=0, keepdim=True).expand(3, -1, -1))
    best = along._of_group(maps, along._best(torch.tensor([0.0, 1.0, 0.5, 0.7, 0.2, 0.7]), 3), 3)
    torch.testing.assert_close(best[:3], maps[1:2].expand(3, -1, -1))
    torch.testing.assert_close(best[4], (maps[3] + maps[5]) / 2)


@pytest.mark.exhaustive
def test_the_derivative_along_a_direction_is_the_inner_product_with_the_gradient(config: Config) -> None:
    config = replace(
        config, allocation=replace(config.allocation, blocks=[0, 1]), rollout=replace(config.rollout, groups=2)
    )
    policy = Policy(config, torch.device("cpu"))
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    batch, about = along._roll_out(policy, load_prompts("scenes:composition")[:8], config, 0)
    batch = replace(batch, slopes=torch.randn_like(batch.slopes))  # images of this model all have the same reward
    gradient = along._gradients(policy, config, batch, parameters, batch.slopes[None])[1][0]
    before = torch.cat([p.detach().flatten() for p in parameters])
    found = along.derivative(policy, config, batch, parameters, gradient.sign())
    torch.testing.assert_close(found.sum(), gradient.abs().sum(), rtol=1e-2, atol=0)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in parameters]), before, rtol=0, atol=0)
    assert found.shape == batch.weights["map"].shape
    sizes = along._sizes(policy, config, batch, parameters, torch.ones_like(gradient), len(batch.missing))
    inner = torch.tensor(sizes[efficiency.WHOLE])[:2, :2]  # "plain", of the two classes
    torch.testing.assert_close(inner.sum(), gradient.square().sum(), rtol=1e-3, atol=0)
    assert set(about["localization"]) == {"map", "group mean", "best sample", "sharpened"}
