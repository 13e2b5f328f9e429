"""attention-map-diffusers: ``init_pipeline`` replaces the attention of diffusers' classes and forwards of the model."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor

MODELS = ("sd3", "unet")
PACKAGES = ("torch", "diffusers")
KEPT = "image to text, for each block, head and token, of both halves of the batch"


@contextmanager
def attach(checkout: str, name: str, model: Any, gradients: bool) -> Iterator[Callable[[], list[Tensor]]]:
    package = _imported(checkout)
    processors = importlib.import_module("diffusers.models.attention_processor")
    classes = [kind for key, kind in vars(processors).items() if isinstance(kind, type) and "AttnProcessor" in key]
    calls = {kind: vars(kind)["__call__"] for kind in classes if "__call__" in vars(kind)}
    package.init_pipeline(SimpleNamespace(**{"transformer" if name == "sd3" else "unet": model}))
    try:
        yield lambda: [maps for blocks in package.attn_maps.values() for maps in blocks.values()]
    finally:  # the package has no function for this
        package.attn_maps.clear()
        for kind, call in calls.items():
            kind.__call__ = call
        for module in model.modules():
            vars(module).pop("forward", None)
            module._forward_hooks.clear()
            if hasattr(getattr(module, "processor", None), "store_attn_map"):
                del module.processor.store_attn_map


def _imported(checkout: str) -> Any:
    """The package. It uses torchvision only to write images, so torchvision need not be installed."""
    import diffusers.loaders.peft  # noqa: F401  # asks whether torchvision is installed, before there is a stub

    if checkout not in sys.path:
        sys.path.insert(0, checkout)
        if importlib.util.find_spec("torchvision") is None:
            sys.modules["torchvision"] = sys.modules["torchvision.transforms"] = SimpleNamespace(ToPILImage=None)
    return importlib.import_module("attention_map_diffusers")
