"""Loads diffusers pipelines, including those saved without some of their components."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def load_pipeline(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """Loads a diffusers pipeline: "small", a local folder or a model of the Hugging Face Hub.

    "small" is the Stable Diffusion 3 that is included in the package: it draws plain shapes with colours and positions,
    32 x 32 pixels, in a second on a CPU. Call it with ``num_inference_steps=16, guidance_scale=2.5,
    max_sequence_length=1``.

    Components that were saved as None, such as the T5 of Stable Diffusion 3, stay None; ``from_pretrained`` alone would
    require them. Weights are loaded from safetensors only, and a local folder is never looked up on the Hub.

    Raises:
        OSError, ValueError: ``path`` is not a pipeline that diffusers can load.

    Example:
        >>> pipeline = load_pipeline("small")
        >>> prompt = "a red circle left of a blue square"
        >>> image = pipeline(prompt, num_inference_steps=16, guidance_scale=2.5, max_sequence_length=1).images[0]
    """
    if path != "small" and "/" not in path and not Path(path).is_dir():
        raise OSError(f'path must be "small", a local folder or the id OWNER/NAME of a model on the Hub, got {path!r}')
    path = str(small_folder()) if path == "small" else path
    with _quiet():
        from diffusers import DiffusionPipeline

        options: dict[str, Any] = {"local_files_only": Path(path).is_dir()}
        saved = DiffusionPipeline.load_config(path, **options)
        absent: dict[str, Any] = {n: None for n, part in saved.items() if isinstance(part, list) and part[0] is None}
        return DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, use_safetensors=True, **absent, **options)


def small_folder() -> Path:
    """The folder of the small model.

    It is data of the training driver, which is in the same distribution; that package is not imported.

    Raises:
        OSError: the package star_trainer is not installed.
    """
    driver = find_spec("star_trainer")
    if driver is None or not driver.submodule_search_locations:
        raise OSError("the small model is in the package star_trainer, which is not installed")
    return Path(driver.submodule_search_locations[0]) / "assets" / "small-sd3"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the bars of loaded weights and warnings about what is optional, such as torchvision."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():  # torch_dtype is deprecated in diffusers 0.42 and required before
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
