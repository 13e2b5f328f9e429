"""Group-relative advantages against Flow-GRPO's formula, and edge cases."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from star_trainer.config import Config, Reward
from star_trainer.credit import (
    advantages_of,
    apart_advantages,
    group_advantages,
    phrase_advantages,
    split_advantages,
)
from star_trainer.rewards.base import Scores


def test_a_group_is_standardised_by_its_own_mean_and_deviation() -> None:
    rewards = torch.rand(24)
    grouped = rewards.view(6, 4)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4).values, expected.flatten())


def test_global_divides_by_the_deviation_of_all_rewards() -> None:
    rewards = torch.rand(24)
    grouped = rewards.view(6, 4)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4, std="global").values, expected.flatten())


def test_a_group_of_equal_rewards_has_advantage_zero_and_is_counted() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 0.5])
    values, flat = group_advantages(rewards, 3)
    assert flat == 1
    assert values[:3].tolist() == [0.0, 0.0, 0.0]
    assert values[3:].abs().max() > 1


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_sample_without_a_reward_is_left_out(std: Literal["group", "global"]) -> None:
    rewards = torch.tensor([0.2, torch.nan, 0.6, 0.1, 0.9, 0.4])
    values, _ = group_advantages(rewards, 3, std=std)
    assert values[1] == 0
    known = torch.tensor([0.2, 0.6])
    deviation = known.std(correction=0) if std == "group" else rewards[rewards.isfinite()].std(correction=0)
    torch.testing.assert_close(values[[0, 2]], (known - known.mean()) / (deviation + 1e-4))


@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_without_any_reward_are_zero(std: Literal["group", "global"]) -> None:
    values, flat = group_advantages(torch.full((4,), torch.nan), 2, std=std)
    assert values.tolist() == [0.0] * 4
    assert flat == 2


def test_rewards_must_be_whole_groups() -> None:
    with pytest.raises(ValueError, match=r"multiple of group_size 4, got \[6\]"):
        group_advantages(torch.zeros(6), 4)


@pytest.mark.parametrize("std", ["group", "global"])
def test_phrases_are_standardised_separately(std: Literal["group", "global"]) -> None:
    rewards = torch.rand(9, 3)
    rewards[3:6] = 0.5  # a flat group
    rewards[6:, 2] = torch.nan  # a prompt of two phrases
    rewards[8] = torch.nan  # a sample without a reward
    values, flat = phrase_advantages(rewards, 3, std=std)
    assert flat == 1
    for phrase in range(3):
        assert torch.equal(values[:, phrase], group_advantages(rewards[:, phrase], 3, std=std).values)
    assert values[3:6].tolist() == [[0.0] * 3] * 3
    assert values[6:, 2].tolist() == [0.0] * 3
    assert values[8].tolist() == [0.0] * 3
    assert float(values[6:8, :2].abs().amin()) > 0


@pytest.mark.parametrize("std", ["group", "global"])
def test_parts_sum_to_the_advantage_if_phrases_sum_to_the_reward(std: Literal["group", "global"]) -> None:
    phrases = torch.rand(12, 3)
    phrases[3:6, 1:] = torch.nan  # a prompt of one phrase
    phrases[6:9] = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])  # equal rewards
    phrases[10] = torch.nan  # a sample without a reward
    rewards = phrases.nansum(dim=1)
    rewards[10] = torch.nan
    values, flat = split_advantages(rewards, phrases, 3, std=std)
    assert flat == 1
    assert torch.equal(values[:, 0], group_advantages(rewards, 3, std=std).values)
    torch.testing.assert_close(values[:, 1:].sum(dim=1), values[:, 0])
    assert values[3:6, 2:].tolist() == [[0.0] * 2] * 3
    assert values[6:9].tolist() == [[0.0] * 4] * 3
    assert values[10].tolist() == [0.0] * 4
    assert float(values[:3, 1:].abs().amin()) > 0


def test_rewards_apart_count_alike_whatever_their_range() -> None:
    """GDPO (arXiv 2601.05242): each reward standardised by group, then the weighted sum by its deviation."""
    narrow, wide = torch.rand(24) / 100, 100 * torch.rand(24)
    expected = torch.zeros(24)
    for weight, own in ((2.0, narrow), (1.0, wide)):
        grouped = own.view(6, 4)
        scaled = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, correction=0, keepdim=True) + 1e-4)
        expected += weight * scaled.flatten()
    weights = {"narrow": 2.0, "wide": 1.0, "watched": 0.0}
    parts = {"narrow": narrow, "wide": wide, "watched": torch.full((24,), torch.nan)}
    values, flat = apart_advantages(Scores(2 * narrow + wide, parts), weights, 4)
    torch.testing.assert_close(values, expected / (expected.std(correction=0) + 1e-4), rtol=1e-5, atol=1e-5)
    assert flat == 0


def test_a_sample_without_one_of_the_rewards_is_left_out_of_all() -> None:
    first, second = torch.tensor([0.2, 0.9, 0.6, 0.1, 0.9, 0.4]), torch.tensor([1.0, torch.nan, 3.0, 2.0, 2.0, 2.0])
    weights = {"first": 1.0, "second": 1.0}
    values, flat = apart_advantages(Scores(first + second, {"first": first, "second": second}), weights, 3)
    assert values[1] == 0
    assert values[0] == pytest.approx(-float(values[2]))
    assert bool((values[3:] != 0).all())
    assert flat == 0
    nothing = torch.full((4,), torch.nan)
    assert apart_advantages(Scores(nothing, {"first": nothing}), {"first": 1.0}, 2).values.tolist() == [0.0] * 4


def test_rewards_apart_require_their_weights() -> None:
    with pytest.raises(ValueError, match=r"weights must be given with reward.combine 'apart', got None"):
        advantages_of(Scores(torch.rand(4), {"first": torch.rand(4)}), Config(reward=Reward(combine="apart")))
