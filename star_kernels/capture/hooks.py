"""Hooks of a captured model that copies of the model do not keep."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


class Hook:
    """A method of ``owner`` as a hook of a module.

    Pickle and deepcopy replace it by a hook that does nothing, and that loads without this library.
    """

    def __init__(self, owner: Any, method: str) -> None:
        self.owner = owner
        self._method = getattr(owner, method)

    @torch.compiler.disable  # compiled models call hooks outside their graph
    def __call__(self, *arguments: Any) -> Any:
        return self._method(*arguments)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")
