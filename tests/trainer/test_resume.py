"""A run that was stopped and resumed ends where the run without a stop does, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from star_trainer import checkpoint
from star_trainer.config import Config
from star_trainer.trainer import Trainer


@pytest.mark.parametrize(("lora_rank", "kl_coef"), [(0, 0.0), (4, 0.1)])
def test_a_resumed_run_is_the_same_run(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    tmp_path: Path,
    lora_rank: int,
    kl_coef: float,
) -> None:
    def run(name: str, epochs: int, *, resume: bool = False) -> None:
        config = configure(
            model={"lora_rank": lora_rank},
            train={"epochs": epochs, "kl_coef": kl_coef, "updates": 2},
            output={"folder": str(tmp_path / name), "resume": resume},
        )
        trainer_of(config).run()

    run("whole", 3)
    run("parts", 2)
    run("parts", 3, resume=True)
    for part in ("weights", "optimizer", "average"):
        whole, parts = (
            (tmp_path / name / "checkpoint-000003" / f"{part}.safetensors").read_bytes() for name in ("whole", "parts")
        )
        assert whole == parts, part


def test_a_checkpoint_of_another_configuration_is_refused_by_key(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    config = configure()
    trainer_of(config).run()
    with pytest.raises(ValueError, match=r"train\.kl_coef: 0\.0 there, 0\.5 here"):
        trainer_of(configure(train={"epochs": 2, "kl_coef": 0.5}, output={"resume": True})).run()
    assert len(checkpoint.find(Path(config.output.folder))) == 1
