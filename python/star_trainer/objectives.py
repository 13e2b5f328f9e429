"""The objectives of ``train.objective``: which settings each of them uses, and which settings contradict each other."""

from __future__ import annotations

import math
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from star_trainer.config import Config, Train

SAMPLED = ("flow_grpo", "grpo_guard", "flow_dppo")  # ratios of the sampler's steps
FORWARD = ("awm", "nft")  # noised samples: any sampler, here ODE steps
OLD_OUTPUT = ("grpo_guard", "flow_dppo", "nft")  # the loss needs the velocity of the rollout's policy
USERS = {  # of settings that not all objectives use; others must leave them at their defaults
    "rollout.transition": SAMPLED,
    "rollout.noise_level": SAMPLED,
    "rollout.averaged": ("nft",),
    "train.ratio": (*SAMPLED, "awm"),
    "train.clip_range": ("flow_grpo", "grpo_guard", "awm"),
    "train.kl_mask_threshold": ("flow_dppo",),
    "train.nft_beta": ("nft",),
}
TRACKERS = ("tensorboard", "wandb", "swanlab", "mlflow")


def clip_range(train: Train) -> float:
    """``train.clip_range``, or the objective's default."""
    if train.clip_range is None:
        return 1.0 if train.objective == "awm" else 1e-4
    return train.clip_range


def step_weights(train: Train) -> str:
    """``train.step_weights``, or the objective's default."""
    return train.step_weights or ("time" if train.objective == "grpo_guard" else "uniform")


def obstacle(config: Config) -> str | None:
    """Why these settings cannot be used together, naming them, or None."""
    train, reward, objective = config.train, config.reward, config.train.objective
    for name, users in USERS.items():
        value, default = _value_and_default(config, name)
        if objective not in users and value != default:
            return (
                f"{name} must be {default!r} with train.objective {objective!r}, which does not use it (only "
                f"{', '.join(users)}), got {value!r}"
            )
    credit, counted = config.allocation.credit, [key for key, weight in reward.weights.items() if weight]
    missing = [name for name in config.output.trackers if name in TRACKERS and find_spec(name) is None]
    found: list[tuple[bool, str]] = [
        (
            objective in FORWARD and config.rollout.shared_noise,
            f"rollout.shared_noise must be False with train.objective {objective!r}, whose ODE steps would draw equal "
            "samples of a group, got True",
        ),
        (
            objective in FORWARD and step_weights(train) != "uniform",
            f"train.step_weights must be 'uniform' or None with train.objective {objective!r}, got "
            f"{train.step_weights!r}",
        ),
        (
            objective == "nft" and credit != "image",
            f"allocation.credit must be 'image' with train.objective 'nft' (one advantage per sample), got {credit!r}",
        ),
        (
            objective == "nft" and train.advantage_clip == math.inf,
            "train.advantage_clip must be finite with train.objective 'nft', which divides by it, got inf",
        ),
        (
            objective in FORWARD and train.kl_coef > 0 and train.kl != "velocity",
            f"train.kl must be 'velocity' with train.objective {objective!r}, which has no transitions, got "
            f"{train.kl!r} with train.kl_coef {train.kl_coef}",
        ),
        (
            train.kl == "velocity" and train.kl_coef == 0,
            "train.kl_coef must be above 0 with train.kl 'velocity', got 0",
        ),
        (
            config.rollout.averaged and train.ema == 0,
            "train.ema must be above 0 with rollout.averaged, which samples from the moving average, got 0",
        ),
        (
            reward.combine == "apart" and len(counted) < 2,
            f"reward.combine must be 'sum' unless two rewards have a weight other than 0, got 'apart' with {counted}",
        ),
        (
            reward.combine == "apart" and credit != "image",
            f"reward.combine must be 'sum' with allocation.credit {credit!r}, which adds the rewards of a phrase, got "
            "'apart'",
        ),
        (
            not set(config.output.trackers) <= set(TRACKERS)
            or len(set(config.output.trackers)) < len(config.output.trackers),
            f"output.trackers must be different ones of {', '.join(TRACKERS)}, got {config.output.trackers}",
        ),
        (
            bool(missing),
            f"output.trackers {', '.join(missing)} must be installed: pip install {' '.join(missing)}",
        ),
    ]
    return next((message for stands, message in found if stands), None) or _hub_obstacle(config.output.push_to_hub)


def _hub_obstacle(repository: str | None) -> str | None:
    """Why a run could not be uploaded to the Hugging Face hub, or None."""
    if repository is None:
        return None
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        return f"output.push_to_hub must be the id of a repository (owner/name), got {repository!r}: {error}"
    if constants.HF_HUB_OFFLINE:
        return "output.push_to_hub must be null with HF_HUB_OFFLINE, which prevents uploads"
    return None if get_token() else "output.push_to_hub requires a login: run `hf auth login`, or set HF_TOKEN"


def _value_and_default(config: Config, name: str) -> tuple[Any, Any]:
    section, setting = name.split(".")
    part = getattr(config, section)
    return getattr(part, setting), next(f.default for f in fields(part) if f.name == setting)
