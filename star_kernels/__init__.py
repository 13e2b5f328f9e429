"""Fused attention maps and spatially weighted policy losses for RL post-training of text-to-image flow models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from star_kernels.allocation import allocate, total_variation
from star_kernels.attention import AttentionOutput, AttentionStatistics, attention, attention_maps
from star_kernels.policy import (
    PolicyLoss,
    Transition,
    dance_sde,
    flow_cps,
    flow_matching,
    flow_sde,
    sample_transition,
    weighted_nft_loss,
    weighted_policy_loss,
)
from star_kernels.selection import TokenSelection

if TYPE_CHECKING:
    from star_kernels.capture import attach_maps, capture_maps
    from star_kernels.prompts import select_tokens

    __version__: str

__all__ = [
    "AttentionOutput",
    "AttentionStatistics",
    "PolicyLoss",
    "TokenSelection",
    "Transition",
    "__version__",
    "allocate",
    "attach_maps",
    "attention",
    "attention_maps",
    "capture_maps",
    "dance_sde",
    "flow_cps",
    "flow_matching",
    "flow_sde",
    "sample_transition",
    "select_tokens",
    "total_variation",
    "weighted_nft_loss",
    "weighted_policy_loss",
]

_SUBMODULES = ("capture", "figures", "maps", "pipelines", "prompts")
_MODULES = {
    "attach_maps": "star_kernels.capture",
    "capture_maps": "star_kernels.capture",
    "select_tokens": "star_kernels.prompts",
}


def __getattr__(name: str) -> Any:
    """Loads what few programs need when it is first used, so that the import takes as long as that of torch."""
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    elif name in _SUBMODULES:
        return import_module(f"star_kernels.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("star-kernels")
    except PackageNotFoundError:  # a clone on the path
        return "unknown"
