"""The range of each numeric setting, and checks of settings that depend on each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from star_trainer.config import Config
from star_trainer.objectives import obstacle
from star_trainer.redact import redacted


@dataclass(frozen=True)
class Range:
    """An interval of numbers: ``least`` and ``most`` are inclusive bounds, ``above`` and ``below`` exclusive ones."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    infinite: bool = False  # whether infinity is accepted

    def __contains__(self, value: float) -> bool:
        if value == math.inf:
            return self.infinite
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if abs(bound) < math.inf)


COUNT, ORDINAL, POSITIVE, SHARE = Range(least=0), Range(least=1), Range(above=0), Range(least=0, most=1)
RANGES = {  # of all numeric settings; equal to the library's range if it has one
    "model.lora_rank": COUNT,
    "model.lora_alpha": ORDINAL,
    "model.text_length": ORDINAL,
    "model.kept_texts": COUNT,
    "rollout.noise_level": POSITIVE,
    "rollout.steps": Range(least=2),
    "rollout.guidance": Range(least=1),
    "rollout.resolution": ORDINAL,
    "rollout.groups": ORDINAL,
    "rollout.group_size": Range(least=2),
    "rollout.batch": ORDINAL,
    "rollout.window": ORDINAL,
    "rollout.window_end": ORDINAL,
    "allocation.strength": SHARE,
    "allocation.cap": Range(above=1),
    "reward.timeout": Range(above=0, most=10**9),  # the maximum wait of a thread is about 300 years
    "train.epochs": ORDINAL,
    "train.updates": ORDINAL,
    "train.passes": ORDINAL,
    "train.steps": ORDINAL,
    "train.batch": ORDINAL,
    "train.learning_rate": COUNT,
    "train.weight_decay": COUNT,
    "train.max_grad_norm": Range(least=0, infinite=True),
    "train.clip_range": SHARE,
    "train.kl_mask_threshold": POSITIVE,
    "train.nft_beta": POSITIVE,
    "train.advantage_clip": Range(above=0, infinite=True),
    "train.kl_coef": COUNT,
    "train.ema": Range(least=0, below=1),
    "train.ema_interval": ORDINAL,
    "train.seed": Range(least=-(2**63), most=2**63 - 1),
    "evaluation.every": COUNT,
    "evaluation.prompts": ORDINAL,
    "evaluation.steps": ORDINAL,
    "output.checkpoint_every": COUNT,
    "output.keep": ORDINAL,
    "output.images_every": COUNT,
}


def check_values(config: Config) -> None:
    """Raises TypeError or ValueError if a setting is not one of the accepted values or out of range, naming its key."""
    for section, kind in get_type_hints(Config).items():
        for setting, hint in get_type_hints(kind).items():
            value = getattr(getattr(config, section), setting)
            if get_origin(hint) is Literal and value not in get_args(hint):
                accepted = ", ".join(map(repr, get_args(hint)))
                raise ValueError(f"{section}.{setting} must be one of {accepted}, got {value!r}")
    for name, allowed in RANGES.items():
        section, setting = name.split(".")
        part = getattr(config, section)
        _check_number(name, getattr(part, setting), get_type_hints(type(part))[setting], allowed)
    level = config.rollout.noise_level
    if config.rollout.transition == "flow_cps" and level > 1:
        raise ValueError(f"rollout.noise_level must be at most 1 with rollout.transition 'flow_cps', got {level}")
    if isinstance(config.allocation.blocks, list) and not config.allocation.blocks:
        raise ValueError("allocation.blocks must be 'default', 'all' or a list of indices, got an empty list")
    if not config.output.folder:
        raise ValueError("output.folder must name a folder, got ''")
    if config.data.eval_prompts == "":
        raise ValueError("data.eval_prompts must name a file or be null, got ''")
    weights = config.reward.weights
    if not weights:
        raise ValueError("reward.weights must name at least one reward, got none")
    for key, weight in weights.items():
        _check_number(f"reward.weights of {redacted(key)!r}", weight, float, Range())
    if not any(weights.values()):
        raise ValueError("reward.weights must have a weight other than 0, got only 0")
    if contradiction := obstacle(config):
        raise ValueError(contradiction)


def _check_number(name: str, value: Any, kind: Any, allowed: Range) -> None:
    kinds = get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return
    whole = int in kinds
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        none = " or None" if type(None) in kinds else ""
        raise TypeError(f"{name} must be {'an integer' if whole else 'a number'}{none}, got {value!r}")
    if value not in allowed:
        bounds = [str(allowed)] if str(allowed) else []
        if not math.isfinite(value) and math.inf in (allowed.most, allowed.below) and not allowed.infinite:
            bounds.append("finite")
        raise ValueError(f"{name} must be {' and '.join(bounds)}, got {value}")


def check(config: Config, processes: int) -> None:
    """Raises TypeError or ValueError, naming the keys, if settings are out of range or contradict each other."""
    check_values(config)
    shares = config.train.updates * processes
    if config.samples % shares:
        raise ValueError(
            f"rollout.groups * rollout.group_size must be a multiple of train.updates * processes = "
            f"{config.train.updates} * {processes}, got {config.rollout.groups} * {config.rollout.group_size}"
        )
    if config.evaluation.prompts % processes:
        raise ValueError(
            f"evaluation.prompts must be a multiple of the {processes} processes, got {config.evaluation.prompts}"
        )
    last = config.rollout.steps - 1
    end = last if config.rollout.window_end is None else config.rollout.window_end
    if end > last:
        raise ValueError(f"rollout.window_end must lie between 1 and rollout.steps - 1 = {last}, got {end}")
    if config.rollout.window is None and config.rollout.window_end is not None:
        raise ValueError(f"rollout.window_end must be None without rollout.window, got {end}")
    if config.rollout.window is not None and config.rollout.window > end:
        raise ValueError(f"rollout.window must lie between 1 and {end}, got {config.rollout.window}")
    noisy = config.rollout.window or last
    if config.train.steps is not None and config.train.steps > noisy:
        raise ValueError(
            f"train.steps must lie between 1 and {noisy}, the number of SDE steps, got {config.train.steps}"
        )
    credit = config.allocation.credit
    if credit != "image" and config.allocation.method == "plain":
        raise ValueError(f"allocation.credit must be 'image' with allocation.method 'plain', got {credit!r}")
    if credit != "image" and config.allocation.source != "auto":
        raise ValueError(
            f"allocation.source must be 'auto' with allocation.credit {credit!r} (the phrases that rewards score), "
            f"got {config.allocation.source!r}"
        )
