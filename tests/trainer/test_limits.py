"""The ranges of numeric settings, and settings that contradict each other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from types import UnionType
from typing import Any, get_args, get_type_hints

import pytest
import torch

import star_kernels
from star_kernels.policy.checks import check_clip, check_coefficients
from star_trainer import limits
from star_trainer.config import Config
from star_trainer.trainer import Trainer


def kinds_of(name: str) -> tuple[type, ...]:
    section, setting = name.split(".")
    kind = get_type_hints(get_type_hints(Config)[section])[setting]
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def with_value(config: Config, name: str, value: Any) -> Config:
    section, setting = name.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{setting: value})})


def test_every_number_has_a_range() -> None:
    numbers = {
        f"{section}.{setting}"
        for section, kind in get_type_hints(Config).items()
        for setting in get_type_hints(kind)
        if {int, float} & set(kinds_of(f"{section}.{setting}"))
    }
    assert numbers == set(limits.RANGES)


@pytest.mark.parametrize("name", limits.RANGES)
def test_a_number_out_of_its_range_is_an_error_that_names_it(name: str) -> None:
    allowed, kinds = limits.RANGES[name], kinds_of(name)
    wrong: list[Any] = [allowed.least - 1, allowed.above, allowed.most + 1, allowed.below, -math.inf, math.nan]
    wrong = [value for value in wrong if not (allowed.infinite and value == math.inf)]
    wrong += [True, "1", *([1.5] if int in kinds else []), *([] if type(None) in kinds else [None])]
    for value in wrong:
        with pytest.raises(
            (TypeError, ValueError), match=rf"{re.escape(name)} must be .*, got {re.escape(repr(value))}"
        ):
            limits.check_values(with_value(Config(), name, value))


def test_numbers_at_their_bounds_are_accepted() -> None:
    for name, allowed in limits.RANGES.items():
        kinds = kinds_of(name)
        good = [bound for bound in (allowed.least, allowed.most) if math.isfinite(bound)]
        good += [None] if type(None) in kinds else []
        for value in good + ([math.inf] if allowed.infinite else []):
            limits.check_values(with_value(Config(), name, value))


@pytest.mark.parametrize("value", [-1.0, -1e-9, 0.0, 1e-9, 1.0, 1.0 + 1e-9, 7.0, math.inf, -math.inf, math.nan])
def test_ranges_equal_those_of_the_library(value: float) -> None:
    """Values that the library would refuse after a rollout are refused before it, and no others."""

    def takes(function: Callable[[], object]) -> bool:
        try:
            function()
        except ValueError:
            return False
        return True

    maps = torch.rand(1, 4)
    functions = {
        "train.clip_range": lambda: check_clip(value),
        "train.advantage_clip": lambda: check_coefficients(value, 0.0),
        "train.kl_coef": lambda: check_coefficients(1.0, value),
        "rollout.noise_level": lambda: star_kernels.dance_sde(0.8, 0.6, eta=value),
        "allocation.strength": lambda: star_kernels.allocate(maps, strength=value),
        "allocation.cap": lambda: star_kernels.allocate(maps, cap=value),
    }
    for name, function in functions.items():
        assert takes(function) == takes(lambda name=name: limits.check_values(with_value(Config(), name, value))), name
    config = with_value(Config(), "rollout.transition", "flow_cps")
    assert takes(lambda: star_kernels.flow_cps(0.8, 0.6, noise_level=value)) == takes(
        lambda: limits.check_values(with_value(config, "rollout.noise_level", value))
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "must name at least one reward, got none"),
        ({"scene": 0.0, "ocr": 0}, "must have a weight other than 0"),
        ({"scene": 1.0, "ocr": math.nan}, "of 'ocr' must be finite, got nan"),
        ({"scene": math.inf}, "of 'scene' must be finite, got inf"),
        ({"scene": True}, "of 'scene' must be a number, got True"),
    ],
)
def test_invalid_reward_weights_are_refused(weights: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"reward\.weights {re.escape(message)}"):
        limits.check_values(with_value(Config(), "reward.weights", weights))


def test_numbers_are_checked_before_files_are_read(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    parts = {"data": {"prompts": "absent.txt"}, "model": {"path": "./absent"}}
    with pytest.raises(ValueError, match=r"train\.max_grad_norm must be at least 0, got -1\.0"):
        trainer_of(configure(train={"max_grad_norm": -1.0}, **parts))


@pytest.mark.parametrize(
    ("parts", "processes", "message"),
    [
        ({"rollout": {"group_size": 1}}, 1, r"rollout\.group_size must be at least 2, got 1"),
        ({"train": {"updates": 3}}, 1, r"multiple of train\.updates \* processes = 3 \* 1, got 2 \* 2"),
        ({}, 3, r"multiple of train\.updates \* processes = 1 \* 3, got 2 \* 2"),
        (
            {"allocation": {"blocks": []}},
            1,
            r"allocation\.blocks must be 'default', 'all' or a list.*got an empty list",
        ),
        ({"output": {"folder": ""}}, 1, r"output\.folder must name a folder"),
        ({"rollout": {"window_end": 2}}, 1, r"rollout\.window_end must be None without rollout\.window, got 2"),
        ({"rollout": {"window": 3}}, 1, r"rollout\.window must lie between 1 and 2, got 3"),
        (
            {"rollout": {"window_end": 3}},
            1,
            r"rollout\.window_end must lie between 1 and rollout\.steps - 1 = 2, got 3",
        ),
        ({"train": {"steps": 3}}, 1, r"train\.steps must lie between 1 and 2, the number of SDE steps, got 3"),
        ({"train": {"ema": 1.0}}, 1, r"train\.ema must be at least 0 and below 1"),
        ({"reward": {"weights": {}}}, 1, r"reward\.weights must name at least one reward"),
        (
            {"allocation": {"credit": "phrase", "method": "plain"}},
            1,
            r"allocation\.credit must be 'image' with allocation\.method 'plain', got 'phrase'",
        ),
        (
            {"allocation": {"credit": "phrase", "source": "words"}},
            1,
            r"allocation\.source must be 'auto' with allocation\.credit 'phrase' .*got 'words'",
        ),
        (
            {"allocation": {"over": "change"}},
            1,
            r"allocation\.over must be one of 'step', 'trajectory', 'total_variation', got 'change'",
        ),
        ({"evaluation": {"steps": 0}}, 1, r"evaluation\.steps must be at least 1, got 0"),
    ],
)
def test_contradictory_settings_are_errors_that_name_them(
    configure: Callable[..., Config], parts: dict[str, dict[str, Any]], processes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        limits.check(configure(**parts), processes)
