"""Experiment trackers, by accelerate's classes: TensorBoard, Weights & Biases, SwanLab and MLflow.

Without a login, or a server in the tracker's own environment variable, a tracker writes to the run's folder.
"""

from __future__ import annotations

import json
import netrc
import os
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

PROJECT = "star-train"


def start(name: str, folder: Path, settings: dict[str, dict[str, Any]], resumed_at: int = 0) -> Any:
    """Starts a tracker.

    Args:
        name: one of ``output.trackers``.
        folder: the run's folder; its name is that of the run.
        settings: the run's settings without secrets, by section.
        resumed_at: number of completed epochs, after which TensorBoard shows only what is written from now on.
    """
    options: dict[str, Any] = {}
    match name:
        case "tensorboard":
            # The writer's thread ends at an error, after which a full queue would block forever.
            options = {"logging_dir": folder, "purge_step": resumed_at or None, "max_queue": 10_000}
        case "wandb":
            options = {"dir": str(folder), "name": folder.name, "settings": {"console": "off"}}
            host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
            if not (os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY") or _in_netrc(host)):
                options["mode"] = "offline"
        case "swanlab":
            options = {"logdir": str(folder / "swanlab"), "experiment_name": folder.name}
            login = Path(os.environ.get("SWANLAB_SAVE_DIR", "~/.swanlab")).expanduser() / ".netrc"
            if not (os.environ.get("SWANLAB_MODE") or os.environ.get("SWANLAB_API_KEY") or login.is_file()):
                options["mode"] = "offline"
        case "mlflow":
            options = {"run_name": folder.name}
            if not os.environ.get("MLFLOW_TRACKING_URI"):
                import_module("mlflow").set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
                options["logging_dir"] = (folder / "mlflow").as_uri()
    tracker = LOGGER_TYPE_TO_CLASS[name]("tensorboard" if name == "tensorboard" else PROJECT, **options)
    tracker.start()
    if name != "tensorboard":  # it would add a folder for each start; config.json is beside its files
        tracker.store_init_configuration(_flat(settings))
    return tracker


def log(tracker: Any, values: dict[str, float], epoch: int) -> None:
    if tracker.name == "tensorboard":  # accelerate waits for the writer's thread, which may have ended
        for name, value in values.items():
            tracker.tracker.add_scalar(name, value, epoch)
    else:
        tracker.log(values, step=epoch)


def log_image(tracker: Any, name: str, path: Path, epoch: int) -> None:
    """Logs an image file under a name."""
    if tracker.name == "mlflow":
        tracker.log_artifact(str(path), "images")
        return
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({name: pixels[None]}, step=epoch, **options)


def _in_netrc(host: str) -> bool:
    """Whether the user's netrc file has a login for a host."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _flat(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings by "section.name"; lists and mappings become text."""
    plain = (bool, int, float, str, type(None))
    return {
        f"{section}.{name}": value if isinstance(value, plain) else json.dumps(value)
        for section, values in settings.items()
        for name, value in values.items()
    }
