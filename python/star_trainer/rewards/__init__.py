"""Rewards that score images.

:func:`build` makes a weighted sum of rewards from names, import paths and URLs. A :class:`RewardService` scores batches
in a thread and reports which reward failed on which sample, and why. Packages and models are loaded when a reward is
constructed.
"""

from star_trainer.rewards.base import PhraseReward, Reward, RewardError, Scores
from star_trainer.rewards.registry import BUILT_IN, build
from star_trainer.rewards.service import Pending, RewardService
from star_trainer.rewards.weighted import WeightedSum

__all__ = [
    "BUILT_IN",
    "Pending",
    "PhraseReward",
    "Reward",
    "RewardError",
    "RewardService",
    "Scores",
    "WeightedSum",
    "build",
]
