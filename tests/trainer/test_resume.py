"""A resumed run equals the uninterrupted run bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiers import mostly_exhaustive

from star_trainer import checkpoint
from star_trainer.config import Config
from star_trainer.policy import fingerprint
from star_trainer.prompts import Prompt, digest, load_prompts
from star_trainer.restore import restore
from star_trainer.trainer import Trainer


@pytest.mark.parametrize(
    ("lora_rank", "kl_coef", "credit"),
    mostly_exhaustive([(0, 0.0, "image"), (4, 0.1, "image"), (0, 0.1, "phrase")], [(4, 0.1, "image")]),
)
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


def test_a_setting_that_is_missing_in_a_checkpoint_has_its_default(
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
    with pytest.raises(ValueError, match=r"allocation\.credit: 'image' in the checkpoint, 'phrase' now"):
        trainer_of(other)


def test_a_checkpoint_of_another_configuration_is_refused_by_key(trained: Trainer) -> None:
    live = trained.saver.live
    other = replace(live.config, train=replace(live.config.train, epochs=2, kl_coef=0.5))
    message = r"train\.kl_coef: 0\.0 in the checkpoint, 0\.5 now\. These settings affect training"
    with pytest.raises(ValueError, match=message):
        restore(checkpoint.find(trained.folder)[-1], replace(live, config=other))


@pytest.fixture
def trained(configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path) -> Trainer:
    """A trainer with a checkpoint of its first epoch."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red bench\na clock\n")
    trainer = trainer_of(configure(data={"prompts": str(prompts)}))
    trainer.train_epoch()
    trainer.saver.keep(trainer.epoch)
    trainer.saver.save()
    return trainer


@pytest.mark.filterwarnings("error")
def test_settings_that_only_affect_memory_may_change(trained: Trainer) -> None:
    """For example after running out of memory."""
    live = trained.saver.live
    other = replace(
        live.config,
        model=replace(live.config.model, gradient_checkpointing=True),
        rollout=replace(live.config.rollout, batch=1),
        train=replace(live.config.train, batch=1),
    )
    assert restore(checkpoint.find(trained.folder)[-1], replace(live, config=other)) == 1


def test_the_batches_do_not_change_what_is_drawn(configure: Callable[..., Config], trained: Trainer) -> None:
    found = []
    for rows in ([range(4)], [range(1), range(1, 4)]):
        batches = [trained.roll_out([trained.prompts[n // 2] for n in numbers], numbers) for numbers in rows]
        found.append(torch.cat([batch.steps[0].prev_sample for batch in batches]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_changed_prompts_warn(trained: Trainer, tmp_path: Path) -> None:
    path = checkpoint.find(trained.folder)[-1]
    (tmp_path / "prompts.txt").write_text("a red bench\na cloak\n")
    edited = replace(trained.saver.live, prompts=digest(load_prompts(str(tmp_path / "prompts.txt"))))
    with pytest.warns(
        RuntimeWarning, match=r"prompts\.txt changed after .* was written: epoch 2 and later ones use the new prompts"
    ):
        assert restore(path, edited) == 1


@pytest.mark.filterwarnings("error")
def test_the_prompt_file_may_move(trained: Trainer) -> None:
    path, live = checkpoint.find(trained.folder)[-1], trained.saver.live
    moved = replace(live.config, data=replace(live.config.data, prompts="elsewhere.txt"))
    assert restore(path, replace(live, config=moved)) == 1
    with pytest.raises(ValueError, match=r"data\.prompts: '.*prompts\.txt' in the checkpoint, 'elsewhere\.txt' now"):
        restore(path, replace(live, config=moved, prompts="of others"))


def test_changed_model_weights_warn(trained: Trainer) -> None:
    path, live = checkpoint.find(trained.folder)[-1], trained.saver.live
    with torch.no_grad():
        trained.policy.pipeline.text_encoder.get_parameter("text_projection.weight").mul_(1.01)
    exchanged = replace(live, loaded=fingerprint(trained.policy.pipeline))
    with pytest.warns(RuntimeWarning, match=r"the weights in model\.path .* changed after .*checkpoint-000001"):
        assert restore(path, exchanged) == 1


@pytest.mark.filterwarnings("error")
def test_the_model_folder_may_move(trained: Trainer) -> None:
    path, live = checkpoint.find(trained.folder)[-1], trained.saver.live
    moved = replace(live.config, model=replace(live.config.model, path="elsewhere"))
    assert restore(path, replace(live, config=moved)) == 1
    with pytest.raises(ValueError, match=r"model\.path: '.*' in the checkpoint, 'elsewhere' now"):
        restore(path, replace(live, config=moved, loaded="of others"))


def test_the_digest_of_prompts_depends_on_their_metadata() -> None:
    one, other = ([Prompt("a clock", {"count": n, "tag": "x"})] for n in (1, 2))
    assert digest(one) != digest(other)
    assert digest(one) == digest([Prompt("a clock", {"tag": "x", "count": 1})])
