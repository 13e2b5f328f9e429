"""What tests of the policy's Triton kernels change for Triton's interpreter on a CPU."""

from __future__ import annotations

import pytest
from problems import BATCH, LAYOUTS

from star_kernels.policy import loss, sampling

BACKEND = ("triton", "cpu")


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes CPU tensors to the requested backend, and shrinks three layouts, since the interpreter is slow.

    Their samples have two tiles, one of them partial, instead of four.
    """
    for module in (loss, sampling):
        monkeypatch.setattr(module, "resolve_backend", lambda backend, _: backend)
    for layout, shape in (("image", (16, 12, 20)), ("packed", (37, 64)), ("many_channels", (300, 3, 3))):
        monkeypatch.setitem(LAYOUTS, layout, ((BATCH, *shape), LAYOUTS[layout][1]))
