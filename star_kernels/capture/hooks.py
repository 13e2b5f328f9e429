"""Hooks of a captured model, which its copies do not keep."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


class Hook:
    """A method as a hook of a module.

    A copy of the module, by pickle or deepcopy, gets a hook that does nothing, and that loads without this library.
    """

    def __init__(self, owner: Any, method: str) -> None:
        self.owner = owner
        self._method = getattr(owner, method)

    @torch.compiler.disable  # a compiled model calls its hooks outside its graph
    def __call__(self, *arguments: Any) -> Any:
        return self._method(*arguments)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")
