"""Why an attention module recorded no maps in a captured forward pass."""

from __future__ import annotations

from typing import Any

from star_kernels.capture.attention_processor import CapturedAttention, recorded_by
from star_kernels.capture.perturbed import skipping_hooks


def explain(model: Any, modules: list[CapturedAttention]) -> str:
    """The cause for the first of the modules without maps, and what to do about it."""
    captured = modules[0]
    processor = captured.attention.processor
    if processor is not captured.recording_processor:
        name = type(processor).__name__
        return (
            f"its attention processor was replaced during the capture by a {name}; fuse_qkv_projections(), "
            "set_attn_processor() and loading an image prompt adapter do that: call them before the capture"
            if recorded_by(processor) is None
            else "its attention processor belongs to another module: give each module its own before the capture"
        )
    if not captured.ran:
        hooks = skipping_hooks(model, captured.name)
        return (
            f"it did not run in this pass. It has diffusers hooks ({', '.join(hooks)}), such as those that skip a "
            "block or reuse an earlier output (caches, PyramidAttentionBroadcast): remove them, with disable_cache() "
            "for a cache, or set enabled = False on the capture for such passes"
            if hooks
            else "it did not run in this pass: choose blocks that run, or set enabled = False on the capture for it"
        )
    backend = getattr(captured.recording_processor, "_attention_backend", None)
    return (
        "its attention was not computed by F.scaled_dot_product_attention or by diffusers' attention dispatcher "
        f"(attention backend: {getattr(backend, 'value', backend)}); "
        'call transformer.set_attention_backend("native"), or leave the module out of blocks'
    )
