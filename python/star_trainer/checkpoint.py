"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from star_trainer.average import Average
from star_trainer.config import Config
from star_trainer.redact import redacted

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of a weight
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_FLAT = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
# What a resumed run may change: what has no part in the training, and what changes memory alone.
_FREE = (
    *("output.", "evaluation.", "train.epochs", "data.eval_prompts", "reward.timeout", "reward.on_failure"),
    *("rollout.batch", "train.batch", "model.gradient_checkpointing"),
)


# Network file systems may have no such thing as flushing a folder.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


class Damaged(ValueError):
    """A checkpoint that cannot be read, or is not as it was written."""


@dataclass(frozen=True)
class Live:
    """What a checkpoint is of, as it is in a run.

    Args:
        prompts: digest of the run's prompts.
        loaded: fingerprint of the pipeline before training.
    """

    model: Any
    optimizer: Any
    average: Average
    accelerator: Any
    config: Config
    prompts: str
    loaded: str


@dataclass(frozen=True)
class Snapshot:
    """The state after an epoch, in the memory of the first process."""

    epoch: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def take(live: Live, epoch: int) -> Snapshot | None:
    """A copy of the state; None but on the first process. All processes call it.

    Raises:
        FloatingPointError: weights that are not finite.
    """
    tensors = {"weights": whole_weights(live.model)}
    flat = get_optimizer_state_dict(live.model, live.optimizer, options=_FLAT)
    tensors["optimizer"] = _on_host({n: v for n, v in flat.items() if isinstance(v, Tensor)})
    tensors["average"] = _on_host({name: whole(value) for name, value in live.average.values.items()})
    if not live.accelerator.is_main_process:
        return None
    _check_complete(f"the state of epoch {epoch}", tensors["weights"], live.average)
    for part, values in tensors.items():
        check_finite(f"the {part} of epoch {epoch}", values)
    scaler = live.accelerator.scaler
    state = {
        "format": FORMAT,
        "epoch": epoch,
        "average_steps": live.average.steps,
        "optimizer": {n: v for n, v in flat.items() if not isinstance(v, Tensor)},
        "scaler": scaler.state_dict() if scaler is not None else None,
        "prompts": live.prompts,
        "loaded": live.loaded,
        "config": redacted(asdict(live.config)),
    }
    return Snapshot(epoch, tensors, state)


def write(snapshot: Snapshot, folder: Path, keep: int) -> Path:
    """Writes ``checkpoint-EPOCH`` into the folder, then removes older ones than ``keep``.

    Raises:
        OSError: it cannot be written, as on a full disk. Nothing of it is left behind then.
    """
    target = folder / _name(snapshot.epoch)
    work = _hidden(target)
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        digests = {}
        for name, values in snapshot.tensors.items():
            if values:
                file = work / f"{name}.safetensors"
                save_file(values, file)
                digests[file.name] = _digest(file)
        (work / "state.json").write_text(json.dumps({**snapshot.state, "sha256": digests}, indent=1))
        for path in (*work.iterdir(), work):
            _flush(path)
        work.rename(target)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise OSError(f"{target} cannot be written: {error}{_room(snapshot, folder)}") from error
    for old in find(folder)[:-keep]:
        _remove(old)
    return target


def restore(path: Path, live: Live) -> int:
    """Brings everything to the state of a checkpoint. Returns the epochs done.

    Warns (RuntimeWarning) where the prompts, or the weights in ``model.path``, are others than the checkpoint's.

    Raises:
        ValueError: a checkpoint of another format or configuration (the keys are named), or one that is damaged; the
            message names the one before that is whole.
    """
    try:
        state, parts = _read(path, live)
    except Damaged as error:
        raise ValueError(f"{error}. {_way_out(path)}") from error
    set_model_state_dict(live.model, parts["weights"], options=StateDictOptions(full_state_dict=True, strict=False))
    flat = {**parts["optimizer"], **state["optimizer"]}
    flat |= {key: True for key in flat if key.endswith(".fused")}  # not so in earlier versions
    set_optimizer_state_dict(live.model, live.optimizer, flat, options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        for name, value in live.average.values.items():
            value.copy_(_like(parts["average"][name], value))
    live.average.steps = state["average_steps"]
    if live.accelerator.scaler is not None and state["scaler"]:
        live.accelerator.scaler.load_state_dict(state["scaler"])
    if state.get("prompts", live.prompts) != live.prompts:
        warnings.warn(
            f"data.prompts {live.config.data.prompts} has other prompts than when {path} was written: epochs from "
            f"{state['epoch'] + 1} on take the new ones. Bring the file back to what it was if that is not meant",
            RuntimeWarning,
            stacklevel=2,
        )
    if state.get("loaded", live.loaded) != live.loaded:
        warnings.warn(
            f"model.path {live.config.model.path} holds other weights than when {path} was written: what is not "
            "trained, as text encoders and the weights below adapters, changes within the run. Bring the model back if "
            "that is not meant",
            RuntimeWarning,
            stacklevel=2,
        )
    return int(state["epoch"])


def whole_weights(model: Any) -> dict[str, Tensor]:
    """Copies of trained parameters and all buffers on the CPU, without the names and parts of distributed wrappers.

    All processes call it.
    """
    return _on_host(get_model_state_dict(model, options=_WHOLE))


def find(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"checkpoint-\d{6,}", p.name))


def clean(folder: Path) -> None:
    """Removes what a run that was killed had not finished writing, or removing."""
    for path in folder.glob(_hidden(Path("checkpoint-*")).name):
        shutil.rmtree(path, ignore_errors=True)


def check_finite(name: str, values: dict[str, Tensor]) -> None:
    """Raises FloatingPointError, naming a tensor, where one holds NaN or infinity."""
    bad = [key for key, value in values.items() if not value.isfinite().all()]
    if bad:
        raise FloatingPointError(f"{name} hold NaN or infinity in {len(bad)} of {len(values)} tensors, as {bad[0]}")


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; all processes call it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _read(path: Path, live: Live) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The state and the tensors of a checkpoint, once they are known to fit the run."""
    state = _read_state(path)
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads {FORMAT}")
    # Files may have moved.
    same = {"data.prompts": state.get("prompts") == live.prompts, "model.path": state.get("loaded") == live.loaded}
    changed = [
        (key, old, new)
        for key, old, new in _differences(_completed(redacted(state["config"])), redacted(asdict(live.config)))
        if not same.get(key)
    ]
    if changed:
        listed = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, old, new in changed)
        raise ValueError(
            f"{path} is of another configuration: {listed}. These settings change what is trained: set them back, or "
            "choose another output.folder"
        )
    if live.accelerator.is_main_process and (problem := _problem(path, state)):
        raise Damaged(f"{path} is damaged: {problem}")
    names = ["weights", "optimizer", *(["average"] if live.average.values else [])]
    try:
        parts: dict[str, dict[str, Any]] = {name: load_file(path / f"{name}.safetensors") for name in names}
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    for part, key, shape in _expected(live.average, parts["optimizer"]):
        found = parts[part].get(key)
        if found is None or found.shape != shape:
            got = "none" if found is None else list(found.shape)
            raise Damaged(f"{path} is damaged: {part}.safetensors must hold {key} of shape {list(shape)}, got {got}")
    return state, parts


def _expected(average: Average, optimizer: dict[str, Tensor]) -> Iterator[tuple[str, str, torch.Size]]:
    """Part, name and shape of the tensors that a run needs."""
    if not optimizer:
        yield "optimizer", "the state of trained weights", torch.Size()
    for name, parameter in average.parameters.items():
        yield "weights", name, parameter.shape
        if average.values:
            yield "average", name, parameter.shape
        moments = [f"state.{name}.{moment}" for moment in MOMENTS]
        if any(key in optimizer for key in moments):  # a weight that never had a gradient has none
            for key in moments:
                yield "optimizer", key, torch.Size() if key.endswith(".step") else parameter.shape


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} cannot be read: state.json: {error}") from error
    kinds = {"format": int, "epoch": int, "average_steps": int, "optimizer": dict, "config": dict}
    if not isinstance(state, dict):
        raise Damaged(f"{path} is damaged: state.json must hold an object, got {type(state).__name__}")
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise Damaged(f"{path} is damaged: state.json must hold {key!r} of type {kind.__name__}")
    if not all(isinstance(values, dict) for values in (*state["config"].values(), state.get("sha256", {}))):
        raise Damaged(f"{path} is damaged: state.json must hold objects of settings and of checksums")
    if path.name != _name(state["epoch"]):
        raise Damaged(f"{path} is damaged: by its state.json it is {_name(state['epoch'])}: was the folder renamed?")
    return state


def _problem(path: Path, state: dict[str, Any]) -> str | None:
    """What is wrong with the files of a checkpoint; one of an earlier version has no checksums."""
    for name, digest in state.get("sha256", {}).items():
        try:
            if _digest(path / name) != digest:
                return f"{name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return str(error)
    return None


def _way_out(path: Path) -> str:
    """Names the newest whole checkpoint before a damaged one."""
    for other in reversed([p for p in find(path.parent) if p.name < path.name]):
        try:
            if _problem(other, _read_state(other)) is None:
                return f"Remove {path}, and the run goes on from {other.name}, which is whole"
        except Damaged:
            continue
    return "There is no whole one before it: choose another output.folder to begin anew"


def _remove(path: Path) -> None:
    """Removes a checkpoint; of a link the link alone. It is gone at once, whole."""
    hidden = _hidden(path)
    try:
        path.rename(hidden)
        if hidden.is_symlink():
            hidden.unlink()
        else:
            shutil.rmtree(hidden)
    except OSError as error:
        warnings.warn(f"{path} cannot be removed: {error}", RuntimeWarning, stacklevel=3)


def _name(epoch: int) -> str:
    return f"checkpoint-{epoch:06d}"


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _room(snapshot: Snapshot, folder: Path) -> str:
    """How much a checkpoint takes, and how much there is."""
    needed = sum(value.nbytes for values in snapshot.tensors.values() for value in values.values())
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f" (it takes {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free)"


def _check_complete(name: str, weights: dict[str, Tensor], average: Average) -> None:
    missing = sorted(set(average.parameters) - set(weights))
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} of {len(average.parameters)} trained weights, as {missing[0]}")


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of settings that came after the checkpoint: they leave everything as it was."""
    return config | {part: values | config.get(part, {}) for part, values in asdict(Config()).items()}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    before, after = _flatten(json.loads(json.dumps(old))), _flatten(json.loads(json.dumps(new)))
    keys = [k for k in sorted({*before, *after}) if not k.startswith(_FREE)]
    return [(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _on_host(values: dict[str, Any]) -> dict[str, Tensor]:
    """Copies: what is on the CPU already would go on changing with the run."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}


def _like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, sharded as another one is."""
    if not hasattr(other, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_FLUSH):
            raise
    finally:
        os.close(handle)
