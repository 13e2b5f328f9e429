"""Loads pipelines of diffusers, also those saved without some of their parts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch


def load_pipeline(path: str, dtype: torch.dtype) -> Any:
    """A pipeline from a local folder or the hub.

    Parts that were saved as absent, such as Stable Diffusion 3's T5, stay absent; ``from_pretrained`` alone would ask
    for them. Weights come from safetensors only, and a local folder is never looked up on the hub.

    Raises:
        OSError, ValueError: nothing there that diffusers can load.
    """
    from diffusers import DiffusionPipeline

    options: dict[str, Any] = {"local_files_only": Path(path).is_dir()}
    saved = DiffusionPipeline.load_config(path, **options)
    absent: dict[str, Any] = {name: None for name, part in saved.items() if isinstance(part, list) and part[0] is None}
    with warnings.catch_warnings():  # diffusers 0.42 renames torch_dtype; older ones know no other name
        warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
        return DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, use_safetensors=True, **absent, **options)
