"""A run on two processes is the run on one: in DDP, and with the weights in parts (FSDP2)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import base_pipelines
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from star_trainer import checkpoint
from star_trainer.config import Config
from star_trainer.record import read_metrics
from star_trainer.trainer import Trainer

SCRIPT = Path(__file__).with_name("two_processes.py")

pytestmark = pytest.mark.exhaustive  # each starts interpreters of its own


def on_two(*configs: tuple[str, Config], fails: bool = False) -> str:
    """Runs configurations, each with its wrapper, in one launch to the end. Returns the standard error."""
    arguments: list[str] = []
    for wrapper, config in configs:
        path = Path(config.output.folder).with_suffix(".yaml")
        path.write_text(yaml.safe_dump(asdict(config)))
        arguments += [wrapper, str(path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert (done.returncode != 0) is fails, done.stderr[-4000:]
    return done.stderr


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


CASES = [  # wrapper, rank of LoRA, kl_coef, credit, objective, number of processes of the first epoch
    ("ddp", 4, 0.1, "image", "flow_grpo", 1),
    ("ddp", 0, 0.1, "phrase", "flow_grpo", 2),
    ("fsdp2", 0, 0.0, "image", "flow_grpo", 1),
    ("fsdp2", 4, 0.1, "image", "grpo_guard", 2),
    ("ddp", 0, 0.0, "image", "flow_dppo", 2),
    ("ddp", 4, 0.0, "image", "awm", 2),
    ("fsdp2", 0, 0.0, "image", "nft", 2),
]

BASES = [("flux", "ddp"), ("qwen_image", "ddp"), ("z_image", "fsdp2")]  # base, wrapper


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_give_the_results_of_one(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    """All cases run in one launch, because starting the processes takes longer than a case.

    In some the first epoch runs on one process, and two processes resume the run.
    """
    made = [
        configure(
            model={"lora_rank": lora_rank},
            data={"prompts": "scenes:composition"},
            allocation={"credit": credit},
            rollout={  # groups lie across processes
                "groups": 3,
                "group_size": 4,
                "batch": 2,
                "averaged": objective == "nft",
            },
            train={
                "epochs": 2,
                "updates": 2,
                "kl_coef": kl_coef,
                "learning_rate": 1e-4,
                "objective": objective,
            },
            reward={"weights": {"rewards_that_fail:Channels": 1.0}},
            evaluation={"every": 2, "prompts": 4},
        )
        for _, lora_rank, kl_coef, credit, objective, _ in CASES
    ]
    folders = [{name: tmp_path / f"{name}-{number}" for name in ("one", "two")} for number in range(len(CASES))]
    launched = []
    for case, config, folder in zip(CASES, made, folders, strict=True):
        one, two = (replace(config, output=replace(config.output, folder=str(path))) for path in folder.values())
        trainer_of(one).run()
        if case[-1] == 1:
            trainer_of(replace(two, train=replace(two.train, epochs=1))).run()
            two = replace(two, output=replace(two.output, resume=True))
        launched.append((case[0], two))
    on_two(*launched)
    for case, config, folder in zip(CASES, made, folders, strict=True):
        check_equal(config, folder["one"], folder["two"], case)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_train_each_base_as_one_does(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    """In one launch, as above."""
    made = {}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square left of a yellow ring")
    for name, wrapper in BASES:
        parts = base_pipelines.settings(name, base_pipelines.save(name, tmp_path))
        parts["rollout"] |= {"groups": 2, "group_size": 4, "batch": 2}
        made[name, wrapper] = configure(
            **parts,
            data={"prompts": str(prompts)},
            train={"epochs": 2, "kl_coef": 0.1, "learning_rate": 1e-4},
            reward={"weights": {"rewards_that_fail:Channels": 1.0}},
            evaluation={"every": 2, "prompts": 2},
        )
    launched = []
    for (name, wrapper), config in made.items():
        folders = (str(tmp_path / f"{name}-{processes}") for processes in ("one", "two"))
        one, two = (replace(config, output=replace(config.output, folder=folder)) for folder in folders)
        trainer_of(one).run()
        launched.append((wrapper, two))
    on_two(*launched)
    for case, config in made.items():
        check_equal(config, tmp_path / f"{case[0]}-one", tmp_path / f"{case[0]}-two", case)


def check_equal(config: Config, first: Path, second: Path, case: tuple) -> None:
    runs = {}
    for name, folder in (("one", first), ("two", second)):
        saved = folder / "checkpoint-000002"
        weights, average, final = (
            flat(load_file(path))
            for path in (
                saved / "weights.safetensors",
                saved / "average.safetensors",
                next((folder / "final").rglob("*.safetensors")),
            )
        )
        # A run that ended after the first epoch has evaluated it.
        metrics = [line for line in read_metrics(folder) if (line["event"], line["epoch"]) != ("evaluation", 1)]
        runs[name] = (weights, average, final, metrics)
    # What a step of AdamW moves, also where the gradient is nothing but rounding.
    moved = config.train.learning_rate * len(runs["one"][0]) ** 0.5
    for one, two in zip(runs["one"][:3], runs["two"][:3], strict=True):
        assert one.shape == two.shape
        assert float((one - two).norm()) <= 0.1 * moved, case
    for one, two in zip(runs["one"][3], runs["two"][3], strict=True):
        for key, value in one.items():
            if not key.startswith(("seconds", "event")):
                assert two[key] == pytest.approx(value, rel=1e-3, abs=1e-5), (case, key)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_a_lost_process_ends_the_run_and_keeps_its_checkpoints(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    """Each process has one batch per epoch; the second process dies in the third epoch."""
    key = "rewards_that_fail:Failing"
    config = configure(
        reward={"weights": {key: 1.0}, "options": {key: {"how": "die", "after": 2}}},
        train={"epochs": 9},
        output={"checkpoint_every": 1},
    )
    told = on_two(("ddp", config), fails=True)
    assert "exitcode  : 3" in told
    assert [path.name for path in checkpoint.find(tmp_path / "run")] == ["checkpoint-000001", "checkpoint-000002"]
