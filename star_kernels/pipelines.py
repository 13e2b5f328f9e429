"""Loads diffusers pipelines, including those saved without some of their components."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def load_pipeline(path: str, dtype: torch.dtype) -> Any:
    """Loads a pipeline from a local folder or the Hugging Face Hub.

    Components that were saved as None, such as the T5 of Stable Diffusion 3, stay None; ``from_pretrained`` alone would
    require them. Weights are loaded from safetensors only, and a local folder is never looked up on the Hub.

    Raises:
        OSError, ValueError: ``path`` is not a pipeline that diffusers can load.
    """
    with _quiet():
        from diffusers import DiffusionPipeline

        options: dict[str, Any] = {"local_files_only": Path(path).is_dir()}
        saved = DiffusionPipeline.load_config(path, **options)
        absent: dict[str, Any] = {n: None for n, part in saved.items() if isinstance(part, list) and part[0] is None}
        return DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, use_safetensors=True, **absent, **options)


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
