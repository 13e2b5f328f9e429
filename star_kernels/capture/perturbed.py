"""Forward passes that guidance runs with a changed model: blocks skipped, attention perturbed.

Skip-layer guidance, perturbed-attention guidance and smoothed-energy guidance compare the prediction with that of a
weakened model. As a guider of diffusers they run the weakened model in a pass of its own, with hooks that are removed
afterwards. The pipelines for perturbed-attention guidance (PAG) append a weakened copy to the batch instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

# The classes of diffusers' hooks that change what a block computes, by name.
_HOOKS = ("TransformerBlockSkipHook", "AttentionProcessorSkipHook", "FeedForwardSkipHook", "SmoothedEnergyGuidanceHook")
_OTHER_HOOKS = (  # that run every block as it is
    "group_offloading",
    "lazy_prefetch_group_offloading",
    "layer_execution_tracker",
    "layerwise_casting",
    "peft_autocast_disable",
)


class Perturbations:
    """Finds what changes the passes of a model. The modules are collected once: walking a whole model is slow."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._attributes: list[dict[str, Any]] = []  # of the modules that can have such hooks or processors

    def in_this_pass(self) -> tuple[str | None, str | None]:
        """The hook that perturbs the pass, and the class of a PAG processor, by name."""
        if not self._attributes:
            self._attributes = [vars(module) for module in _inner_modules(self._model)]
        hook = pag = None
        for attributes in self._attributes:
            if "_diffusers_hook" in attributes:
                hook = hook or _hook(attributes)
            processor = attributes.get("processor")
            if processor is not None:
                if type(processor).__name__.startswith("PAG"):
                    pag = type(processor).__name__
                query = attributes["_modules"].get("to_q")
                if query is not None and "_diffusers_hook" in vars(query):
                    hook = hook or _hook(vars(query))
        return hook, pag


def _inner_modules(model: Any) -> Iterator[Any]:
    """The modules that contain others: models, blocks, attention and feed-forward modules."""
    stack = [model]
    while stack:
        module = stack.pop()
        yield module
        stack += [child for child in module._modules.values() if child is not None and child._modules]


def _hook(attributes: dict[str, Any]) -> str | None:
    hooks = attributes["_diffusers_hook"].hooks
    return next((type(hook).__name__ for hook in hooks.values() if type(hook).__name__ in _HOOKS), None)


def register_for_guiders(made: type[Any], original: type[Any]) -> None:
    """Lets diffusers' guiders skip the attention of a processor of class ``made`` as that of ``original``."""
    registry = getattr(sys.modules.get("diffusers.hooks._helpers"), "AttentionProcessorRegistry", None)
    try:
        if registry is not None:
            registry.register(made, registry.get(original))
    except (AttributeError, TypeError, ValueError):  # the original has no entry: guiders cannot skip it either
        pass


def skipping_hooks(model: Any, name: str) -> list[str]:
    """Names of diffusers' hooks that may skip a module, on it and on the modules that contain it."""
    found: list[str] = []
    module = model
    for part in ("", *name.split(".")) if name else ("",):
        module = module._modules.get(part) if part else module
        if module is None:  # removed from the model during the capture
            break
        found += getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return [hook for hook in found if hook not in _OTHER_HOOKS]
