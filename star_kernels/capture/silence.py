"""Why a block of a captured pass gave no maps."""

from __future__ import annotations

from typing import Any

from star_kernels.capture.answer import Block, captured_by


def reason(model: Any, blocks: list[Block]) -> str:
    """The cause at the first of some blocks without maps, and what to do about it."""
    block = blocks[0]
    processor = block.attention.processor
    if processor is not block.capturing:
        name = type(processor).__name__
        return (
            f"its attention processor was exchanged during the capture, for a {name}; fuse_qkv_projections(), "
            "set_attn_processor() and loading an image prompt adapter do that: exchange it first, then capture"
            if captured_by(processor) is None
            else "its attention processor is another module's: give each module its own before the capture"
        )
    if not block.ran:
        found = _diffusers_hooks(model, block.name)
        return (
            f"it did not run in this pass. Hooks of diffusers are on it ({', '.join(found)}), such as skip a block or "
            "take its output of an earlier pass (caches, PyramidAttentionBroadcast): remove them, with "
            "disable_cache() for a cache, or set the capture's enabled to False for such passes"
            if found
            else "it did not run in this pass: choose blocks that run, or set the capture's enabled to False for it"
        )
    backend = getattr(block.capturing, "_attention_backend", None)
    return (
        "the attention there did not go through F.scaled_dot_product_attention "
        f"(its attention backend: {getattr(backend, 'value', backend)}); "
        'call transformer.set_attention_backend("native")'
    )


def _diffusers_hooks(model: Any, name: str) -> list[str]:
    """Names of diffusers' hooks on a module and on those that hold it."""
    found: list[str] = []
    module = model
    for part in ("", *name.split(".")):
        module = module._modules[part] if part else module
        found += getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    return found
