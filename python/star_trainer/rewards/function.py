"""A plain function as a reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from star_trainer.redact import redacted
from star_trainer.rewards.base import Metadata


class FunctionReward:
    """A reward that calls ``function(images, prompts)``, or ``function(images, prompts, metadata)``.

    Args:
        function: returns float32 ``[N]``, see :class:`star_trainer.rewards.Reward`. Its name is the reward's.
        options: further keyword arguments.

    Raises:
        ValueError: the function does not accept these arguments.
    """

    def __init__(self, function: Callable[..., Tensor], options: Mapping[str, Any]) -> None:
        self.name = function.__name__
        self._function, self._options = function, dict(options)
        signature = inspect.signature(function)
        self._arguments = 3 if "metadata" in signature.parameters and "metadata" not in options else 2
        try:
            signature.bind(*range(self._arguments), **options)
        except TypeError as error:
            raise ValueError(
                f"reward {self.name!r} must be a function of (images, prompts) or (images, prompts, metadata) that "
                f"accepts its options {redacted(self._options)!r}: {error}"
            ) from None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return self._function(*(images, prompts, metadata)[: self._arguments], **self._options)
