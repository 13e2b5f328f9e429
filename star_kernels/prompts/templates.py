"""The template that a pipeline puts around a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MARK = "\ue000"  # a private-use character that occurs in no template


def template_parts(render: Callable[[str], str]) -> dict[str, Any]:
    """The text of a template before and after the prompt, and whether it strips the prompt."""
    before, mark, after = render(_MARK).partition(_MARK)
    if not mark:
        raise ValueError("the chat template must contain the prompt unchanged, got one that changes or omits it")
    return {"prefix": before, "suffix": after, "strips": f" {_MARK} " not in render(f" {_MARK} ")}
