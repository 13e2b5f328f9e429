"""Pipelines of SD3 and FLUX with small random transformers and real tokenizers; text embeddings are random."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

PROMPTS = ["a red bench and a blue teapot", 'a neon sign that reads "Fresh Broth Daily"']
TEXT = 90  # longer than CLIP's 77
SIZE = 16  # rows and columns of SD3's latents


def _tokenizers() -> Any:
    """The tokenizers of tests/prompts."""
    path = Path(__file__).resolve().parents[1] / "prompts" / "local_tokenizers.py"
    spec = importlib.util.spec_from_file_location("local_tokenizers_of_prompts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _randomised(model: nn.Module) -> nn.Module:
    """Random weights that give distinct maps and let text affect all outputs; some are zero at initialisation."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
        else:
            nn.init.normal_(parameter, std=1.2 * parameter[0].numel() ** -0.5)
    return model.eval()


def sd3_pipeline() -> Any:
    torch.manual_seed(0)
    made = _tokenizers()
    transformer = SD3Transformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=_randomised(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None,
        text_encoder=None, tokenizer=made.clip_tokenizer(), text_encoder_2=None, tokenizer_2=made.clip_tokenizer(),
        text_encoder_3=None, tokenizer_3=made.t5_tokenizer(),
    )  # fmt: skip


def flux_pipeline(channels: int = 16) -> Any:
    torch.manual_seed(0)
    made = _tokenizers()
    transformer = FluxTransformer2DModel(
        in_channels=channels, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=None, text_encoder=None,
        tokenizer=made.clip_tokenizer(), text_encoder_2=None, tokenizer_2=made.t5_tokenizer(),
        transformer=_randomised(transformer),
    )  # fmt: skip


def embeddings(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Text embeddings [B, TEXT, 32] and pooled embeddings [B, 16]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TEXT, 32, generator=generator), torch.randn(batch, 16, generator=generator)
