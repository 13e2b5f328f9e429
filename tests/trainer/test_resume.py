"""A run that was stopped and resumed ends where the run without a stop does, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from star_trainer import checkpoint
from star_trainer.config import Config, Data, Evaluation, Model, Output, Reward, Rollout, Train
from star_trainer.small import SMALL
from star_trainer.small.pipeline import build
from star_trainer.trainer import Trainer


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    build(replace(SMALL, heads=2, blocks=2, text_width=32)).save_pretrained(folder)
    return folder


def run(pipeline: Path, folder: Path, epochs: int, *, resume: bool = False, lora_rank: int = 0, kl_coef: float = 0.0):
    config = Config(
        model=Model(path=str(pipeline), lora_rank=lora_rank, text_length=1),
        data=Data(prompts="scenes:text"),
        rollout=Rollout(steps=3, guidance=1.5, groups=2, group_size=2, batch=2),
        reward=Reward(weights={"jpeg-compressibility": 1.0}),
        train=Train(epochs=epochs, learning_rate=1e-2, kl_coef=kl_coef, ema_interval=1),
        evaluation=Evaluation(every=0),
        output=Output(folder=str(folder), pictures_every=0, tensorboard=False, resume=resume),
    )
    trainer = Trainer(config, Accelerator(cpu=True), progress=False)
    trainer.run()
    return trainer


@pytest.mark.parametrize(("lora_rank", "kl_coef"), [(0, 0.0), (4, 0.1)])
def test_a_resumed_run_is_the_same_run(pipeline_folder: Path, tmp_path: Path, lora_rank: int, kl_coef: float) -> None:
    options = {"lora_rank": lora_rank, "kl_coef": kl_coef}
    run(pipeline_folder, tmp_path / "whole", 3, **options)
    run(pipeline_folder, tmp_path / "parts", 2, **options)
    run(pipeline_folder, tmp_path / "parts", 3, resume=True, **options)
    for part in ("weights", "optimizer", "average"):
        whole, parts = (
            (tmp_path / name / "checkpoint-000003" / f"{part}.safetensors").read_bytes() for name in ("whole", "parts")
        )
        assert whole == parts, part


def test_a_checkpoint_of_another_configuration_is_refused_by_key(pipeline_folder: Path, tmp_path: Path) -> None:
    run(pipeline_folder, tmp_path, 1)
    with pytest.raises(ValueError, match=r"train\.kl_coef: 0\.0 there, 0\.5 here"):
        run(pipeline_folder, tmp_path, 2, resume=True, kl_coef=0.5)
    assert len(checkpoint.find(tmp_path)) == 1
