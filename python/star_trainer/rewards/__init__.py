"""Rewards: what scores the images that a policy makes.

:func:`build` makes a weighted sum of rewards from names, import paths and addresses; a :class:`RewardService` scores
batches by it away from the training thread, and says which sample of which reward failed, and why. Packages and models
are loaded when a reward is made, not before.
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
