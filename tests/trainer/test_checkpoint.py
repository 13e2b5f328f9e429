"""Checkpoints are restored as they were written; a damaged one is an error that says what is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from star_trainer import checkpoint
from star_trainer.checkpoint import Live
from star_trainer.config import Config
from star_trainer.restore import restore
from star_trainer.trainer import Trainer


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """A run with two checkpoints, shared by all tests of this file."""
    return {}


@pytest.fixture
def live(
    made: dict[str, Any],
    configure: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Live:
    if not made:
        trainer = trainer_of(configure(output={"folder": str(tmp_path_factory.mktemp("checkpoints"))}))
        for _ in range(2):
            trainer.train_epoch()
            trainer.saver.keep(trainer.epoch)
            trainer.saver.save()
        made.update(live=trainer.saver.live, folder=trainer.folder)
    return made["live"]


@pytest.fixture
def newest(live: Live, made: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the second of two checkpoints."""
    for path in checkpoint.find(made["folder"]):
        shutil.copytree(path, tmp_path / path.name)
    return tmp_path / "checkpoint-000002"


def edit_state(path: Path, edit: Callable[[Any], Any]) -> None:
    file = path / "state.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))


def without_checksums(path: Path) -> None:
    """Checksums are optional in a checkpoint."""
    edit_state(path, lambda state: {key: value for key, value in state.items() if key not in ("sha256", "prompts")})


def edit_tensors(path: Path, part: str, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    without_checksums(path)
    file = path / f"{part}.safetensors"
    save_file(edit(load_file(file)), file)


def truncate(path: Path, name: str) -> None:
    (path / name).write_bytes((path / name).read_bytes()[:-9])


def flip(path: Path, name: str) -> None:
    """One bit of the last tensor."""
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)


def first(tensors: dict[str, torch.Tensor], end: str = "weight") -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated tensors": (lambda p: truncate(p, "weights.safetensors"), "the SHA-256 of weights.safetensors differs"),
    "a bit": (lambda p: flip(p, "optimizer.safetensors"), "the SHA-256 of optimizer.safetensors differs"),
    "no file": (lambda p: (p / "average.safetensors").unlink(), "average.safetensors"),
    "truncated state": (lambda p: truncate(p, "state.json"), r"state\.json"),
    "no state": (lambda p: (p / "state.json").unlink(), r"state\.json"),
    "a list": (lambda p: edit_state(p, lambda state: [state]), r"state\.json must contain an object, got list"),
    "no key": (
        lambda p: edit_state(p, lambda state: {k: v for k, v in state.items() if k != "average_steps"}),
        "state.json must contain 'average_steps' of type int",
    ),
    "another epoch": (
        lambda p: edit_state(p, lambda state: {**state, "epoch": 1}),
        "is named checkpoint-000001 in its state.json",
    ),
    "no settings": (lambda p: edit_state(p, lambda state: {**state, "config": {"train": 1}}), "objects of settings"),
    "truncated, without checksums": (
        lambda p: (without_checksums(p), truncate(p, "weights.safetensors")),
        "cannot be read",
    ),
    "a weight's shape": (
        lambda p: edit_tensors(p, "weights", lambda t: {**t, first(t): torch.zeros(1)}),
        r"weights\.safetensors must contain .* of shape \[.*\], got \[1\]",
    ),
    "an average's shape": (
        lambda p: edit_tensors(p, "average", lambda t: {**t, first(t): torch.zeros(1)}),
        r"average\.safetensors must contain .* of shape \[.*\], got \[1\]",
    ),
    "no weight": (
        lambda p: edit_tensors(p, "weights", lambda t: {k: v for k, v in t.items() if k != first(t)}),
        r"weights\.safetensors must contain .*, got none",
    ),
    "no moment": (
        lambda p: edit_tensors(p, "optimizer", lambda t: {k: v for k, v in t.items() if k != first(t, "exp_avg")}),
        r"optimizer\.safetensors must contain state\..*\.exp_avg of shape .*, got none",
    ),
    "no moments": (
        lambda p: edit_tensors(p, "optimizer", lambda t: {}),
        r"optimizer\.safetensors must contain .* got none",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_an_error_that_names_the_one_before(live: Live, newest: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    before = [p.detach().clone() for p in live.average.parameters.values()]
    damage(newest)
    with pytest.raises(ValueError, match=message) as caught:
        restore(newest, live)
    assert str(newest) in str(caught.value)
    assert f"Remove {newest} to resume from checkpoint-000001, which is not damaged" in str(caught.value)
    assert all(torch.equal(p, old) for p, old in zip(live.average.parameters.values(), before, strict=True))


def test_the_error_does_not_name_another_damaged_checkpoint(live: Live, newest: Path) -> None:
    truncate(newest, "weights.safetensors")
    flip(newest.with_name("checkpoint-000001"), "weights.safetensors")
    with pytest.raises(ValueError, match="No earlier checkpoint is undamaged"):
        restore(newest, live)


def test_a_checkpoint_without_checksums_of_an_unfused_optimiser_is_restored(live: Live, newest: Path) -> None:
    without_checksums(newest)

    def unfused(optimizer: dict[str, Any]) -> dict[str, Any]:
        return {key: None if key.endswith(".fused") else value for key, value in optimizer.items()}

    edit_state(newest, lambda state: {**state, "optimizer": unfused(state["optimizer"])})
    assert restore(newest, live) == 2
    assert all(group["fused"] for group in live.optimizer.param_groups)


def test_links_to_old_checkpoints_are_unlinked(live: Live, tmp_path: Path) -> None:
    """A checkpoint may be moved to another disk and replaced by a link."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    (folder / "checkpoint-000001").symlink_to(elsewhere)
    (folder / "checkpoint-000002").symlink_to(tmp_path / "nowhere")
    snapshot = checkpoint.take(live, 3)
    assert snapshot is not None
    checkpoint.write(snapshot, folder, keep=1)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-000003"]
    assert elsewhere.is_dir()


def test_a_checkpoint_that_cannot_be_removed_warns(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path, **options: Any) -> None:
        if not options:
            raise OSError("device or resource busy")

    (tmp_path / "checkpoint-000001").mkdir()
    monkeypatch.setattr(shutil, "rmtree", busy)
    snapshot = checkpoint.take(live, 3)
    assert snapshot is not None
    with pytest.warns(RuntimeWarning, match="checkpoint-000001 cannot be removed: device or resource busy"):
        checkpoint.write(snapshot, tmp_path, keep=1)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["checkpoint-000003"]


def test_a_file_system_that_cannot_flush_folders_is_supported(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", files_alone)
    snapshot = checkpoint.take(live, 2)
    assert snapshot is not None
    assert restore(checkpoint.write(snapshot, tmp_path, keep=1), live) == 2


def test_weights_that_are_not_finite_are_not_written(live: Live) -> None:
    parameter = next(iter(live.average.parameters.values()))
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the weights of epoch 3 contain NaN or infinity in 1 of"):
        checkpoint.take(live, 3)
    with torch.no_grad():
        parameter.copy_(before)


def test_a_snapshot_is_a_copy(live: Live) -> None:
    snapshot = checkpoint.take(live, 3)
    assert snapshot is not None
    parameters = [*live.average.parameters.values(), *live.average.values.values()]
    parameters += [v for s in live.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    own = {parameter.data_ptr() for parameter in parameters}
    assert not any(v.data_ptr() in own for part in snapshot.tensors.values() for v in part.values())
