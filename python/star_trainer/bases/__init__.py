"""The families of models that the driver trains; each has a file in this folder.

To add one, write a :class:`Base` in a file of its own and add its pipeline to ``BASES``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from star_trainer.bases.base import Base, Text

__all__ = ["BASES", "Base", "Text", "base_of"]

BASES = {  # class of the pipeline: module of this folder and class
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3",
    "FluxPipeline": "flux:Flux",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "ZImagePipeline": "z_image:ZImage",
}


def base_of(pipeline: Any, *, text_length: int, guidance: float) -> Base:
    """The base of a pipeline's class or of one that it derives from.

    Raises:
        ValueError: the driver does not train this pipeline, or its model does not accept these settings.
    """
    found = next((BASES[cls.__name__] for cls in type(pipeline).__mro__ if cls.__name__ in BASES), None)
    if found is None:
        raise ValueError(f"model.path must be one of {', '.join(BASES)}, got a {type(pipeline).__name__}")
    module, name = found.split(":")
    base: type[Base] = getattr(import_module(f"{__name__}.{module}"), name)
    return base(pipeline, text_length=text_length, guidance=guidance)
