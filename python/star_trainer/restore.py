"""Restores a run from a checkpoint that is complete and fits the run's settings."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

from star_trainer.average import Average
from star_trainer.checkpoint import FORMAT, Live, digest_of, find, folder_name
from star_trainer.config import Config
from star_trainer.redact import redacted
from star_trainer.weights import sharded_like

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of a weight
# Settings that a resumed run may change: those that do not affect training, and those that only affect memory.
_FREE = (
    *("output.", "evaluation.", "train.epochs", "data.eval_prompts", "reward.timeout", "reward.on_failure"),
    *("rollout.batch", "train.batch", "model.gradient_checkpointing", "model.offload", "model.kept_texts"),
)


class Damaged(ValueError):
    """A checkpoint that cannot be read or that changed after it was written."""


def restore(path: Path, live: Live) -> int:
    """Sets the state of a run to that of a checkpoint. Returns the number of completed epochs.

    Warns:
        RuntimeWarning: the prompts, or the weights in ``model.path``, differ from those of the checkpoint.

    Raises:
        ValueError: the checkpoint has another format or configuration (the message names the keys), or is damaged (the
            message names the latest checkpoint that is not).
    """
    try:
        state, parts = _read(path, live)
    except Damaged as error:
        raise ValueError(f"{error}. {_way_out(path)}") from error
    set_model_state_dict(live.model, parts["weights"], options=StateDictOptions(full_state_dict=True, strict=False))
    flat = {**parts["optimizer"], **state["optimizer"]}
    flat |= {key: True for key in flat if key.endswith(".fused")}  # the optimiser of a run is always fused
    set_optimizer_state_dict(live.model, live.optimizer, flat, options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        for name, value in live.average.values.items():
            value.copy_(sharded_like(parts["average"][name], value))
    live.average.steps = state["average_steps"]
    if live.accelerator.scaler is not None and state["scaler"]:
        live.accelerator.scaler.load_state_dict(state["scaler"])
    if state.get("prompts", live.prompts) != live.prompts:
        warnings.warn(
            f"data.prompts {live.config.data.prompts} changed after {path} was written: epoch {state['epoch'] + 1} and "
            "later ones use the new prompts. Restore the file if this is not intended",
            RuntimeWarning,
            stacklevel=2,
        )
    if state.get("loaded", live.loaded) != live.loaded:
        warnings.warn(
            f"the weights in model.path {live.config.model.path} changed after {path} was written: frozen weights "
            "(text encoders, weights below adapters) differ from those of earlier epochs. Restore the model if this is "
            "not intended",
            RuntimeWarning,
            stacklevel=2,
        )
    return int(state["epoch"])


def _read(path: Path, live: Live) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The state and the tensors of a checkpoint, after they were checked against the run."""
    state = _read_state(path)
    if state["format"] != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {state['format']}")
    # Paths may differ if their contents are the same.
    same = {"data.prompts": state.get("prompts") == live.prompts, "model.path": state.get("loaded") == live.loaded}
    changed = [
        (key, old, new)
        for key, old, new in _differences(_completed(redacted(state["config"])), redacted(asdict(live.config)))
        if not same.get(key)
    ]
    if changed:
        listed = "; ".join(f"{key}: {old!r} in the checkpoint, {new!r} now" for key, old, new in changed)
        raise ValueError(
            f"{path} has another configuration: {listed}. These settings affect training: change them back, or choose "
            "another output.folder"
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
            raise Damaged(f"{path} is damaged: {part}.safetensors must contain {key} of shape {list(shape)}, got {got}")
    return state, parts


def _expected(average: Average, optimizer: dict[str, Tensor]) -> Iterator[tuple[str, str, torch.Size]]:
    """Part, name and shape of each tensor that a run needs."""
    if not optimizer:
        yield "optimizer", "the state of trained weights", torch.Size()
    for name, parameter in average.parameters.items():
        yield "weights", name, parameter.shape
        if average.values:
            yield "average", name, parameter.shape
        moments = [f"state.{name}.{moment}" for moment in MOMENTS]
        if any(key in optimizer for key in moments):  # absent for a weight that never had a gradient
            for key in moments:
                yield "optimizer", key, torch.Size() if key.endswith(".step") else parameter.shape


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} cannot be read: state.json: {error}") from error
    kinds = {"format": int, "epoch": int, "average_steps": int, "optimizer": dict, "config": dict}
    if not isinstance(state, dict):
        raise Damaged(f"{path} is damaged: state.json must contain an object, got {type(state).__name__}")
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise Damaged(f"{path} is damaged: state.json must contain {key!r} of type {kind.__name__}")
    if not all(isinstance(values, dict) for values in (*state["config"].values(), state.get("sha256", {}))):
        raise Damaged(f"{path} is damaged: state.json must contain objects of settings and of checksums")
    if path.name != folder_name(state["epoch"]):
        raise Damaged(f"{path} is named {folder_name(state['epoch'])} in its state.json: was the folder renamed?")
    return state


def _problem(path: Path, state: dict[str, Any]) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Checksums are optional."""
    for name, digest in state.get("sha256", {}).items():
        try:
            if digest_of(path / name) != digest:
                return f"the SHA-256 of {name} differs from that in state.json"
        except OSError as error:
            return str(error)
    return None


def _way_out(path: Path) -> str:
    """Advice that names the latest undamaged checkpoint before a damaged one."""
    for other in reversed([p for p in find(path.parent) if p.name < path.name]):
        try:
            if _problem(other, _read_state(other)) is None:
                return f"Remove {path} to resume from {other.name}, which is not damaged"
        except Damaged:
            continue
    return "No earlier checkpoint is undamaged: choose another output.folder to start a new run"


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint, with defaults for settings that it does not contain."""
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
