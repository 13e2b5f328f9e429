"""Models with random weights: parts of SD3.5-Medium and of Stable Diffusion's UNet, and tiny models of both kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

TEXT = {"sd3": 333, "unet": 77}
SETTINGS = {
    "sd3": "2 blocks of SD3.5-Medium at 512² (1024 image and 333 text tokens)",
    "unet": "a UNet with the width and the resolutions of the first level of Stable Diffusion 1.5 at 512² (4096 and "
    "1024 image tokens, 77 text tokens)",
}


def sd3(*, tiny: bool = False) -> Any:
    heads, head_dim, latent = (2, 16, 16) if tiny else (24, 64, 64)
    return diffusers.SD3Transformer2DModel(
        sample_size=latent,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        joint_attention_dim=32 if tiny else 4096,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=32 if tiny else 2048,
        pos_embed_max_size=latent // 2,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )


def sd3_inputs(*, tiny: bool = False) -> dict[str, Any]:
    latent, width, pooled = (16, 32, 32) if tiny else (64, 4096, 2048)
    return {
        "hidden_states": torch.randn(2, 16, latent, latent),
        "encoder_hidden_states": torch.randn(2, TEXT["sd3"], width),
        "pooled_projections": torch.randn(2, pooled),
        "timestep": torch.full((2,), 500.0),
    }


def unet(*, tiny: bool = False) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=16 if tiny else 64,
        block_out_channels=(16, 16) if tiny else (320, 320),
        layers_per_block=1,
        norm_num_groups=4 if tiny else 32,
        cross_attention_dim=32 if tiny else 768,
        attention_head_dim=2 if tiny else 8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def unet_inputs(*, tiny: bool = False) -> dict[str, Any]:
    latent, width = (16, 32) if tiny else (64, 768)
    return {
        "sample": torch.randn(2, 4, latent, latent),
        "encoder_hidden_states": torch.randn(2, TEXT["unet"], width),
        "timestep": torch.tensor(500),
    }


MODELS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "sd3": (sd3, sd3_inputs),
    "unet": (unet, unet_inputs),
}


def make(name: str, *, tiny: bool = False) -> tuple[Any, dict[str, Any]]:
    """A model without gradients of its parameters and the inputs of a pass: both halves of the guidance of an image."""
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    return build(tiny=tiny).eval().requires_grad_(False), {**inputs(tiny=tiny), "return_dict": False}
