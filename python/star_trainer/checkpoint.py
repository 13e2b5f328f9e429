"""Writes checkpoints: a folder of safetensors and JSON files that appears complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from star_trainer.average import Average
from star_trainer.config import Config
from star_trainer.redact import redacted
from star_trainer.weights import check_finite, on_host, whole, whole_weights

FORMAT = 1
_FLAT = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
# Errors of network file systems that cannot flush a folder.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


@dataclass(frozen=True)
class Live:
    """The objects of a run whose state a checkpoint contains.

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
    """The state after an epoch, in main memory of the first process."""

    epoch: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def take(live: Live, epoch: int) -> Snapshot | None:
    """Copies the state on the first process; returns None on the others. All processes must call it.

    Raises:
        FloatingPointError: a weight, an average or a moment is not finite.
    """
    tensors = {"weights": whole_weights(live.model)}
    flat = get_optimizer_state_dict(live.model, live.optimizer, options=_FLAT)
    tensors["optimizer"] = on_host({n: v for n, v in flat.items() if isinstance(v, Tensor)})
    tensors["average"] = on_host({name: whole(value) for name, value in live.average.values.items()})
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
    """Writes ``checkpoint-EPOCH`` into the folder, then removes all but the latest ``keep`` checkpoints.

    Raises:
        OSError: the checkpoint cannot be written, for example because the disk is full. No partial files remain.
    """
    target = folder / folder_name(snapshot.epoch)
    work = _hidden(target)
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        digests = {}
        for name, values in snapshot.tensors.items():
            if values:
                file = work / f"{name}.safetensors"
                save_file(values, file)
                digests[file.name] = digest_of(file)
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


def find(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"checkpoint-\d{6,}", p.name))


def clean(folder: Path) -> None:
    """Removes partial checkpoints of a run that was killed while it wrote or removed them."""
    for path in folder.glob(_hidden(Path("checkpoint-*")).name):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Removes a checkpoint atomically; of a symbolic link, only the link."""
    hidden = _hidden(path)
    try:
        path.rename(hidden)
        if hidden.is_symlink():
            hidden.unlink()
        else:
            shutil.rmtree(hidden)
    except OSError as error:
        warnings.warn(f"{path} cannot be removed: {error}", RuntimeWarning, stacklevel=3)


def folder_name(epoch: int) -> str:
    return f"checkpoint-{epoch:06d}"


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _room(snapshot: Snapshot, folder: Path) -> str:
    """The size of a checkpoint and the free space, for an error message."""
    needed = sum(value.nbytes for values in snapshot.tensors.values() for value in values.values())
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f" (it needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free)"


def _check_complete(name: str, weights: dict[str, Tensor], average: Average) -> None:
    missing = sorted(set(average.parameters) - set(weights))
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} of {len(average.parameters)} trained weights, such as {missing[0]}"
        )


def digest_of(path: Path) -> str:
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
