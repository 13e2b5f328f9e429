"""Gradient checkpointing: a block that is computed again captures as it did the first time.

What is computed again must save the same tensors for its backward pass, so it must take the same path, even if the
selection has changed meanwhile or the capture is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from star_kernels.capture.answer import Block
from star_kernels.capture.passes import Pass, Passes


class Checkpointing:
    """Diffusers' checkpointing functions of a model, exchanged for the length of a forward pass."""

    def __init__(self, model: Any, passes: Passes, blocks: list[Block]) -> None:
        self._model = model
        self._modules: list[Any] | None = None  # found when first needed: a walk over a whole model takes milliseconds
        self._exchanged: list[tuple[Any, Any]] = []
        self._passes = passes
        self._blocks = blocks

    def begin(self) -> None:
        self.end()  # of a pass that did not come to its end
        if not torch.is_grad_enabled():
            return
        if self._modules is None:
            self._modules = [m for m in self._model.modules() if hasattr(m, "gradient_checkpointing")]
        for module in self._modules:
            if module.gradient_checkpointing and "_gradient_checkpointing_func" in vars(module):
                function = module._gradient_checkpointing_func
                self._exchanged.append((module, function))
                module._gradient_checkpointing_func = self._recalling(function)

    def end(self) -> None:
        for module, function in self._exchanged:
            module._gradient_checkpointing_func = function
        self._exchanged = []

    def _recalling(self, function: Callable[..., Any]) -> Callable[..., Any]:
        current = self._passes.current

        def checkpoint(module: Any, *args: Any, **kwargs: Any) -> Any:
            recall = _Recall(module, current, self._passes, self._blocks)
            if not torch.compiler.is_compiling():
                return function(recall, *args, **kwargs)
            before = _let_maps_out(True)
            result = function(recall, *args, **kwargs)
            _let_maps_out(before)
            return result

        return checkpoint


class _Recall:
    """A checkpointed module that remembers the pass in which it is called first."""

    def __init__(self, module: Any, current: Pass | None, passes: Passes, blocks: list[Block]) -> None:
        self.module, self.current, self.passes, self.blocks = module, current, passes, blocks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.current is None or self.passes.takes(self.current):
            return self.module(*args, **kwargs)
        removed = [block for block in self.blocks if block.capturing is None]
        for block in removed:
            block.install()
        try:
            with self.passes.again(self.current):
                return self.module(*args, **kwargs)
        finally:
            for block in removed:
                block.remove()


@torch.compiler.assume_constant_result
def _let_maps_out(allowed: bool) -> bool:
    """Runs while a graph is traced: maps may leave a checkpointed block, once. Without it that is an error."""
    config, option = torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"
    before = bool(getattr(config, option, False))
    if hasattr(config, option):
        setattr(config, option, allowed)
    return before
