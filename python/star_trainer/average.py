"""The exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """``average += (1 - decay) (weights - average)`` every ``interval`` optimiser steps, in float32.

    Args:
        model: the average is of its parameters that require gradients.
        decay: 0 keeps no average: the weights themselves are used instead.
        interval: optimiser steps between updates.
    """

    def __init__(self, model: nn.Module, decay: float, interval: int) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.decay, self.interval, self.steps = decay, interval, 0
        kept = self.parameters if decay > 0 else {}
        self.values: dict[str, Tensor] = {n: p.detach().clone().float() for n, p in kept.items()}

    @torch.no_grad()
    def step(self, skipped: Tensor | float = 0.0) -> None:
        """Counts an optimiser step. In the first steps the decay is smaller, to forget the initial values.

        Args:
            skipped: 1 leaves the average unchanged; a tensor may be on the device and is used without synchronisation.
        """
        self.steps += 1
        if self.steps % self.interval:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        weight = (1 - decay) * (1 - skipped)
        for name, value in self.values.items():
            value.add_((self.parameters[name].detach().float() - value) * weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the averaged weights into the model within the context."""
        if not self.values:
            yield
            return
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.values)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
