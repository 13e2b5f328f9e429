"""Samples, steps and noise of a process, as functions of seed, epoch and sample number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from star_trainer.config import Config, Rollout, Train
from star_trainer.prompts import choose, load_prompts
from star_trainer.schedule import noise, noisy_steps, schedule_of, shares, trained_steps


@pytest.mark.parametrize(("processes", "updates"), [(1, 1), (2, 3), (4, 2)])
def test_every_sample_is_assigned_once(processes: int, updates: int) -> None:
    config = Config(rollout=Rollout(groups=6, group_size=8), train=Train(updates=updates))
    parts = [shares(config, 3, processes, rank) for rank in range(processes)]
    assert {len(part) for rank in parts for part in rank} == {48 // updates // processes}
    assert sorted(n for rank in parts for part in rank for n in part) == list(range(48))


def test_an_update_takes_the_same_samples_on_one_process_as_on_two() -> None:
    config = Config(rollout=Rollout(groups=6, group_size=8), train=Train(updates=2))
    one, first, second = shares(config, 3, 1, 0), shares(config, 3, 2, 0), shares(config, 3, 2, 1)
    assert [sorted(part) for part in one] == [sorted(a + b) for a, b in zip(first, second, strict=True)]
    assert shares(config, 4, 1, 0) != one


def test_noise_follows_from_its_name_alone() -> None:
    together = noise((2, 3), ["a", "b"], torch.device("cpu"))
    assert torch.equal(together[1:], noise((2, 3), ["b"], torch.device("cpu")))
    assert not torch.equal(together[0], together[1])


def test_the_window_moves_and_stays_in_its_bounds() -> None:
    config = Config(rollout=Rollout(steps=10, window=2, window_end=5))
    windows = [noisy_steps(config, epoch) for epoch in range(64)]
    assert {tuple(w) for w in windows} == {(n, n + 1) for n in range(4)}
    assert all(trained_steps(config, epoch) == windows[epoch] for epoch in range(64))


def test_without_a_window_all_steps_are_sde_steps_and_all_but_the_last_are_trained() -> None:
    config = Config(rollout=Rollout(steps=5))
    assert noisy_steps(config, 0) == [0, 1, 2, 3, 4]
    assert trained_steps(config, 0) == [0, 1, 2, 3]


def test_a_subset_of_steps_is_drawn_each_epoch() -> None:
    config = Config(rollout=Rollout(steps=10), train=Train(steps=3))
    drawn = [trained_steps(config, epoch) for epoch in range(32)]
    assert all(len(set(steps)) == 3 and max(steps) < 9 and steps == sorted(steps) for steps in drawn)
    assert len({tuple(steps) for steps in drawn}) > 8


def test_noise_levels_are_the_schedulers_own() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = schedule_of(SimpleNamespace(scheduler=scheduler), 4).sigmas
    assert len(sigmas) == 5
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    scheduler.set_timesteps(4)
    assert sigmas == tuple(float(s) for s in scheduler.sigmas)


def test_all_prompts_are_used_before_any_is_repeated() -> None:
    prompts = load_prompts("scenes:composition")[:10]
    epochs = [choose(prompts, 5, epoch, 0) for epoch in range(4)]
    assert {p.text for p in epochs[0] + epochs[1]} == {p.text for p in prompts}
    assert {p.text for p in epochs[2] + epochs[3]} == {p.text for p in prompts}
    assert epochs[0] + epochs[1] != epochs[2] + epochs[3]
