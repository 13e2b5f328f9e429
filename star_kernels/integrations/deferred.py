"""Checks of values on a device that raise without a wait: at the first call after the values have arrived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST = 64  # checks that wait for their values; a call with more waits for the oldest


class _Pending(NamedTuple):
    numbers: Tensor  # in host memory
    copied: Any  # the event after the copy; None if it is complete
    judge: Callable[[Tensor], str | None]


class DeferredChecks:
    """Copies numbers to host memory asynchronously and judges them when they have arrived, at a later call.

    Numbers in host memory are judged at once.
    """

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def add(self, numbers: Tensor, judge: Callable[[Tensor], str | None]) -> None:
        """Records a check, and judges those whose numbers have arrived.

        Args:
            numbers: a small tensor; none on the meta device are judged.
            judge: called with the numbers in host memory; returns the message of an error, or None.

        Raises:
            ValueError: the message of this or an earlier check.
        """
        if numbers.is_meta or torch.compiler.is_compiling():
            return
        copied = None
        numbers = numbers.detach()
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_Pending(numbers, copied, judge))
        self.settle()

    def settle(self) -> None:
        """Judges the numbers that have arrived.

        Raises:
            ValueError: the message of a check.
        """
        while self._pending:
            numbers, copied, judge = self._pending[0]
            if copied is not None and not copied.query():
                if len(self._pending) <= _MOST:
                    return
                copied.synchronize()
            del self._pending[0]
            if (message := judge(numbers)) is not None:
                self._pending.clear()
                raise ValueError(message)
