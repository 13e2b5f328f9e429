"""Gradient checkpointing: a recomputed block captures as it did the first time.

The recomputation must save the same tensors for backward, so it must take the same path, even if the selection has
changed since or the capture was removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from star_kernels.capture.attention_processor import CapturedAttention
from star_kernels.capture.passes import ForwardPass, Passes
from star_kernels.torch_internals import constant_in_graph


class Checkpointing:
    """Replaces the checkpointing functions of a diffusers model during a forward pass."""

    def __init__(self, model: Any, passes: Passes, modules: list[CapturedAttention]) -> None:
        self._model = model
        self._candidates: list[Any] | None = None  # found on first use: a walk over a whole model takes milliseconds
        self._replaced: list[tuple[Any, Any]] = []
        self._passes = passes
        self._modules = modules

    def begin(self) -> None:
        self.end()  # in case the previous pass was interrupted
        if not torch.is_grad_enabled():
            return
        if self._candidates is None:
            self._candidates = [m for m in self._model.modules() if hasattr(m, "gradient_checkpointing")]
        for module in self._candidates:
            if module.gradient_checkpointing and "_gradient_checkpointing_func" in vars(module):
                function = module._gradient_checkpointing_func
                self._replaced.append((module, function))
                module._gradient_checkpointing_func = self._replacement(function)

    def end(self) -> None:
        for module, function in self._replaced:
            module._gradient_checkpointing_func = function
        self._replaced = []

    def _replacement(self, function: Callable[..., Any]) -> Callable[..., Any]:
        current = self._passes.current

        def checkpoint(module: Any, *args: Any, **kwargs: Any) -> Any:
            checkpointed = _CheckpointedModule(module, current, self._passes, self._modules)
            if not torch.compiler.is_compiling():
                return function(checkpointed, *args, **kwargs)
            before = _allow_side_effects(True)
            result = function(checkpointed, *args, **kwargs)
            _allow_side_effects(before)
            return result

        return checkpoint


class _CheckpointedModule:
    """A checkpointed module that remembers the forward pass in which it was first called."""

    def __init__(
        self, module: Any, forward_pass: ForwardPass | None, passes: Passes, modules: list[CapturedAttention]
    ) -> None:
        self.module, self.forward_pass, self.passes, self.modules = module, forward_pass, passes, modules

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.forward_pass is None or self.passes.is_open(self.forward_pass):
            return self.module(*args, **kwargs)
        removed = [captured for captured in self.modules if captured.recording_processor is None]
        for captured in removed:
            captured.install()
        try:
            with self.passes.recompute(self.forward_pass):
                return self.module(*args, **kwargs)
        finally:
            for captured in removed:
                captured.remove()


@constant_in_graph
def _allow_side_effects(allowed: bool) -> bool:
    """Runs while a graph is traced: lets a checkpointed block store its maps, once. Otherwise that is an error."""
    config, option = torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"
    before = bool(getattr(config, option, False))
    if hasattr(config, option):
        setattr(config, option, allowed)
    return before
