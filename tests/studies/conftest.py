"""A rollout of a tiny pipeline, as the studies make it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from star_trainer.config import Config
from star_trainer.policy import Policy
from star_trainer.prompts import load_prompts
from studies import allocations


@pytest.fixture(scope="module")
def config(pipeline_folder: Path) -> Config:
    made = Config()
    return replace(
        made,
        model=replace(made.model, path=str(pipeline_folder), text_length=1),
        rollout=replace(made.rollout, steps=4, groups=3, group_size=2, guidance=1.5),
    )


@pytest.fixture(scope="module")
def rollout(config: Config) -> allocations.Rollout:
    policy = Policy(config, torch.device("cpu"))
    prompts = load_prompts("scenes:composition")[:3]
    return allocations.roll_out(policy, prompts, config, 0, Accelerator(cpu=True).autocast)
