"""A run that was stopped and resumed ends where the run without a stop does, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from star_trainer import checkpoint
from star_trainer.config import Config
from star_trainer.trainer import Trainer


@pytest.mark.parametrize(("lora_rank", "kl_coef", "credit"), [(0, 0.0, "image"), (4, 0.1, "image"), (0, 0.1, "phrase")])
def test_a_resumed_run_is_the_same_run(
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    tmp_path: Path,
    lora_rank: int,
    kl_coef: float,
    credit: str,
) -> None:
    def run(name: str, epochs: int, *, resume: bool = False) -> None:
        config = configure(
            model={"lora_rank": lora_rank},
            data={"prompts": "scenes:composition"},
            allocation={"credit": credit},
            reward={"weights": {"rewards_that_fail:Channels": 1.0}},
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


def test_a_setting_that_a_checkpoint_lacks_had_its_default(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    config = configure()
    trainer_of(config).run()
    state = Path(config.output.folder) / "checkpoint-000001" / "state.json"
    written = json.loads(state.read_text())
    del written["config"]["allocation"]["credit"]
    state.write_text(json.dumps(written))
    assert trainer_of(configure(output={"resume": True})).epoch == 1
    other = configure(output={"resume": True}, allocation={"credit": "phrase"}, reward={"weights": {"scene": 1.0}})
    with pytest.raises(ValueError, match=r"allocation\.credit: 'image' there, 'phrase' here"):
        trainer_of(other)


def test_a_checkpoint_of_another_configuration_is_refused_by_key(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    config = configure()
    trainer_of(config).run()
    with pytest.raises(ValueError, match=r"train\.kl_coef: 0\.0 there, 0\.5 here"):
        trainer_of(configure(train={"epochs": 2, "kl_coef": 0.5}, output={"resume": True})).run()
    assert len(checkpoint.find(Path(config.output.folder))) == 1
