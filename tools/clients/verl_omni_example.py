"""examples/verl-omni composed with VeRL-Omni's configuration: its settings exist, and pass VeRL-Omni's own checks."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.clients.interface import Finding

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "verl-omni"
# Dictionaries whose keys VeRL-Omni does not list.
FREE = ("extra_tokenizers", "engine_kwargs", "runtime_env")


def check(folder: Path) -> Iterator[Finding]:
    """Findings of the settings."""
    hydra, omegaconf = importlib.import_module("hydra"), importlib.import_module("omegaconf").OmegaConf
    text = (EXAMPLE / "star.yaml").read_text()
    os.environ.update(dict.fromkeys(re.findall(r"oc\.env:(\w+)", text), "2"))
    config = str(folder / "verl_omni/trainer/config")
    with hydra.initialize_config_dir(config_dir=config, version_base=None):
        base = hydra.compose("diffusion_trainer")
    with hydra.initialize_config_dir(config_dir=str(EXAMPLE), version_base=None):
        made = hydra.compose("star", overrides=[f"hydra.searchpath=[file://{config}]"])
    own = omegaconf.to_container(omegaconf.load(EXAMPLE / "star.yaml"), resolve=False)
    unknown = sorted(_unknown(own, omegaconf.to_container(base, resolve=False)))
    yield Finding("example: every setting is one of VeRL-Omni's", not unknown, ", ".join(unknown))
    omegaconf.resolve(made)
    attention = importlib.import_module("verl_omni.utils.diffusion_attention")
    attention.validate_attention_consistency(made)
    actor = made.actor_rollout_ref
    sampler = actor.model.algo.sde_type == actor.rollout.algo.sde_type == "cps"
    yield Finding("example: the actor has the sampler of the rollout", sampler)
    yield Finding("example: numbers are numbers", isinstance(made.data.train_batch_size, int))


def _unknown(own: Any, base: Any, path: str = "") -> Iterator[str]:
    for key, value in own.items():
        if key in FREE or path + key == "defaults":
            continue
        if key not in base:
            yield path + key
        elif isinstance(value, dict):
            yield from _unknown(value, base[key], f"{path}{key}.")
