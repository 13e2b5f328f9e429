"""A rollout, and its update in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from star_trainer.config import Config
from star_trainer.policy import Text
from star_trainer.rollout import roll_out
from star_trainer.samples import Batch
from star_trainer.trainer import Trainer


def rolled_out(trainer: Trainer, config: Config) -> Batch:
    prompts = [trainer.prompts[n // config.rollout.group_size] for n in range(config.samples)]
    return roll_out(trainer.policy, prompts, range(config.samples), config, 0, trainer.accelerator.autocast)


def doubled(trainer: Trainer, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """Converts batch and model to float64, because the rounding errors of float32 are about 1e-6."""
    policy = trainer.policy
    policy.model.double()
    encode = policy.encode
    monkeypatch.setattr(policy, "encode", lambda prompts: _double(encode(prompts)))
    monkeypatch.setattr(policy, "_unconditional", None)
    names = ("sample", "prev_sample", "log_prob", "model_output", "weights")
    steps = [
        replace(step, **{n: value.double() for n in names if (value := getattr(step, n)) is not None})
        for step in batch.steps
    ]
    return replace(batch, text=_double(batch.text), steps=steps)


def _double(text: Text) -> Text:
    return replace(text, tokens=text.tokens.double(), pooled=None if text.pooled is None else text.pooled.double())
