"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
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
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_FLAT = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
# What a resumed run may change.
_FREE = ("output.", "evaluation.", "train.epochs", "data.eval_prompts", "reward.timeout", "reward.on_failure")


def save(
    folder: Path, epoch: int, model: Any, optimizer: Any, average: Average, accelerator: Any, config: Config
) -> Path:
    """Writes ``checkpoint-EPOCH`` into the folder, then removes older ones than ``output.keep``.

    All processes call it; the first one writes.
    """
    target = folder / f"checkpoint-{epoch:06d}"
    tensors = {"weights": whole_weights(model)}
    flat = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    tensors["optimizer"] = _contiguous({n: v for n, v in flat.items() if isinstance(v, Tensor)})
    tensors["average"] = _contiguous({name: whole(value) for name, value in average.values.items()})
    state = {
        "format": FORMAT,
        "epoch": epoch,
        "average_steps": average.steps,
        "optimizer": {n: v for n, v in flat.items() if not isinstance(v, Tensor)},
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "config": redacted(asdict(config)),
    }
    if accelerator.is_main_process:
        _check_complete(f"the state of epoch {epoch}", tensors["weights"], average)
        work = folder / f".{target.name}.tmp"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for name, values in tensors.items():
            if values:
                save_file(values, work / f"{name}.safetensors")
        (work / "state.json").write_text(json.dumps(state, indent=1))
        for path in (*work.iterdir(), work):
            _flush(path)
        work.rename(target)
        _flush(folder)
        for old in find(folder)[: -config.output.keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def restore(path: Path, model: Any, optimizer: Any, average: Average, accelerator: Any, config: Config) -> int:
    """Brings everything to the state of a checkpoint. Returns the epochs done.

    Raises:
        ValueError: a checkpoint of another format or configuration (the keys are named), or one that cannot be read.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        parts: dict[str, Any] = {n: load_file(path / f"{n}.safetensors") for n in ("weights", "optimizer")}
        values = load_file(path / "average.safetensors") if average.values else {}
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads {FORMAT}")
    changed = _differences(_completed(redacted(state["config"])), redacted(asdict(config)))
    if changed:
        listed = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, old, new in changed)
        raise ValueError(f"{path} is of another configuration: {listed}")
    _check_complete(str(path), parts["weights"], average)
    set_model_state_dict(model, parts["weights"], options=StateDictOptions(full_state_dict=True, strict=False))
    flat = {**parts["optimizer"], **state["optimizer"]}
    set_optimizer_state_dict(model, optimizer, flat, options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        for name, value in average.values.items():
            value.copy_(_like(values[name], value))
    average.steps = state["average_steps"]
    if accelerator.scaler is not None and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return int(state["epoch"])


def whole_weights(model: Any) -> dict[str, Tensor]:
    """Trained parameters and all buffers on the CPU, without the names and parts of distributed wrappers.

    All processes call it.
    """
    return _contiguous(get_model_state_dict(model, options=_WHOLE))


def find(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"checkpoint-\d{6,}", p.name))


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


def _contiguous(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in values.items()}


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; all processes call it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, sharded as another one is."""
    if not hasattr(other, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
