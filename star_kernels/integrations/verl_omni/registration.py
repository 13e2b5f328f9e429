"""register: VeRL-Omni's losses replaced by subclasses of them, and its engines patched."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from star_kernels.integrations.means import SAMPLERS
from star_kernels.integrations.verl_omni.engine import Select, feed_latents
from star_kernels.integrations.verl_omni.losses import Clipped, ForwardProcess, Guarded, Masked, Options, StarLoss

ALGORITHMS = "verl_omni.trainer.diffusion.diffusion_algos"
ENGINES = "verl_omni.workers.engine.fsdp.diffusers_impl"
VEOMNI_ENGINES = "verl_omni.workers.engine.veomni.diffusion_impl"

LOSSES: dict[str, type[StarLoss]] = {
    "flow_grpo": Clipped,  # also of algorithm=mix_grpo
    "dance_grpo": Clipped,
    "grpo_guard": Guarded,
    "flow_dppo": Masked,
    "diffusion_nft": ForwardProcess,
}
_FED = ("PPODiffusersFSDPEngine", "NFTDiffusersFSDPEngine")


def register(
    *,
    ratio: str = "sample",
    strength: float = 1.0,
    cap: float | None = None,
    sde_type: str | None = None,
    select: Select | None = None,
    **capture: Any,
) -> dict[str, type[StarLoss]]:
    """Replaces VeRL-Omni's losses by subclasses with weights, and patches its engines to pass latents and maps.

    Without weights each loss is the replaced one, bit for bit. A second call replaces the options of the first.

    Args:
        ratio: "sample" or "location", see :func:`star_kernels.weighted_policy_loss`. "location" needs a wider
            ``clip_ratio``, and is used without weights too.
        strength, cap: of :func:`star_kernels.allocate`, for maps.
        sde_type: the sampler: "sde", "cps" or "dance_sde". If None, that of the engine's config. Every loss with
            weights compares the log-probabilities of the adapter with those of the sampler; a mismatch is an error.
        select, capture: see :func:`feed_latents`.

    Returns:
        The registered classes by ``loss_mode``. Those of modes without support refuse weights.

    Raises:
        ImportError: VeRL-Omni is not installed.
        RuntimeError: VeRL-Omni has none of the known engines.
    """
    try:
        algorithms, engines = importlib.import_module(ALGORITHMS), importlib.import_module(ENGINES)
    except ImportError as error:
        raise ImportError(f"register() requires VeRL-Omni ({ALGORITHMS}): {error}") from error
    if sde_type is not None and sde_type not in SAMPLERS:
        raise ValueError(f"sde_type must be None or one of {', '.join(SAMPLERS)}, got {sde_type!r}")
    options = Options(ratio, strength, cap, sde_type, maps_expected=select is not None)
    _patch(engines, select, capture)
    if importlib.util.find_spec("veomni") is not None:
        _patch(importlib.import_module(VEOMNI_ENGINES), select, capture, ("VeOmniDiffusionEngine",))
    registered = {}
    for name, loss in algorithms.DIFFUSION_LOSS_REGISTRY.items():
        replaced = getattr(type(loss), "replaced", type(loss))
        mixin = LOSSES.get(name, StarLoss)
        members = {"name": name, "options": options, "replaced": replaced, "__doc__": replaced.__doc__}
        registered[name] = type(f"Star{replaced.__name__}", (mixin, replaced), members)
    for name, made in registered.items():
        algorithms.register_diffusion_loss(name)(made)
    return registered


def _patch(module: ModuleType, select: Select | None, capture: dict[str, Any], fed: tuple[str, ...] = _FED) -> None:
    """Patches the engines of a module; those whose losses have no weights refuse them."""
    engines = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and "forward_step" in vars(value) and value.__module__ == module.__name__
    }
    if not set(fed) & engines.keys():
        raise RuntimeError(
            f"{module.__name__} must have the engine {' or '.join(fed)}, got {', '.join(engines) or 'none'}: this "
            "version of VeRL-Omni is not supported"
        )
    for name, engine in engines.items():
        if not getattr(vars(engine)["forward_step"], "__isabstractmethod__", False):
            feed_latents(engine, select, supported=name in fed, **capture)
