"""Tiny random models whose processors make several attention calls, and their inputs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from tiny_models import BATCH, COLUMNS, IMAGE, ROWS, TEXT, flux, flux_inputs, sd3, sd3_inputs, unet, unet_inputs
from torch import nn

CONTEXT = 512  # the number of text tokens of Wan, a constant of its processor
PROMPT = 5  # tokens of an image prompt


def wan(image: bool = True) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        **({"image_dim": 24, "added_kv_proj_dim": 32} if image else {}),
    )


def wan_inputs(image: bool = True) -> dict[str, Any]:
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 1, 2 * ROWS, 2 * COLUMNS),
        "encoder_hidden_states": torch.randn(BATCH, CONTEXT, 32),
        "timestep": torch.full((BATCH,), 500.0),
    }
    return {**inputs, "encoder_hidden_states_image": torch.randn(BATCH, PROMPT, 24)} if image else inputs


def qwen_image_21() -> nn.Module:
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def qwen_image_21_inputs() -> dict[str, Any]:
    slots = IMAGE // 4
    return {
        "hidden_states": torch.randn(BATCH, IMAGE, 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 32),
        "timestep": torch.full((BATCH,), 0.5),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * BATCH,
        "img_mask": torch.arange(TEXT + slots).expand(BATCH, -1) >= TEXT,
        "encoder_hidden_states_mask": torch.arange(TEXT) < torch.tensor([[TEXT], [TEXT - 2]]),
    }


def unet_with_image_prompt() -> nn.Module:
    model = unet()
    processors = {}
    for name, processor in model.attn_processors.items():
        if "attn2" in name:
            width = model.get_submodule(name.removesuffix(".processor")).to_q.in_features
            processor = IPAdapterAttnProcessor2_0(width, cross_attention_dim=32, num_tokens=(PROMPT,))
        processors[name] = processor
    model.set_attn_processor(processors)
    model.encoder_hid_proj = _Prompts()
    model.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return model


class _Prompts(nn.Module):
    """The projection of image prompts, whose result is a list of tokens for each."""

    def forward(self, images: Any) -> list[torch.Tensor]:
        return list(images)


def unet_with_image_prompt_inputs() -> dict[str, Any]:
    return {**unet_inputs(), "added_cond_kwargs": {"image_embeds": [torch.randn(BATCH, 1, PROMPT, 32)]}}


def sd3_with_image_prompt() -> nn.Module:
    model = sd3()
    model.set_attn_processor(
        {
            name: SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=32, ip_hidden_states_dim=24, head_dim=16, timesteps_emb_dim=20
            )
            for name in model.attn_processors
        }
    )
    return model


def sd3_with_image_prompt_inputs() -> dict[str, Any]:
    prompt = {"ip_hidden_states": torch.randn(BATCH, TEXT, 24), "temb": torch.randn(BATCH, 20)}
    return {**sd3_inputs(), "joint_attention_kwargs": prompt}


def flux_with_image_prompt() -> nn.Module:
    model = flux()
    processors = dict(model.attn_processors)
    for name in processors:
        if "single" not in name:
            processors[name] = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=24, num_tokens=(PROMPT,))
    model.set_attn_processor(processors)
    return model


def flux_with_image_prompt_inputs() -> dict[str, Any]:
    # As many tokens of the image prompt as keys of the call with the text.
    return {**flux_inputs(), "joint_attention_kwargs": {"ip_hidden_states": [torch.randn(BATCH, TEXT + IMAGE, 24)]}}
