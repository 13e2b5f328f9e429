"""Tiny random models of the families of image models, by the length of the text of each sample of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from tiny_models import COLUMNS, IMAGE, ROWS
from torch import Tensor, nn

LONG, SHORT = 7, 5
REGISTERS = 8  # learned tokens before AuraFlow's text
Lengths = Sequence[int]


def _text(lengths: Lengths, width: int = 32) -> Tensor:
    return torch.randn(len(lengths), max(lengths), width)


def _mask(lengths: Lengths) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def _time(lengths: Lengths, value: float = 0.5) -> Tensor:
    return torch.full((len(lengths),), value)


def _latent(lengths: Lengths, channels: int = 4) -> Tensor:
    return torch.randn(len(lengths), channels, 2 * ROWS, 2 * COLUMNS)


def grid_ids(axes: int, text: int = 0) -> Tensor:
    ids = torch.zeros(text + IMAGE, axes)
    ids[text:, 1] = torch.arange(IMAGE) // COLUMNS
    ids[text:, 2] = torch.arange(IMAGE) % COLUMNS
    return ids


def z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 4, 8],
        axes_lens=[160, 32, 32],
    )


def z_image_inputs(lengths: Lengths) -> dict[str, Any]:
    captions = [torch.randn(length, 32) for length in lengths]
    return {"x": list(_latent(lengths).unsqueeze(2)), "t": _time(lengths), "cap_feats": captions}


def hunyuan_image() -> nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(2, 2),
        text_embed_dim=32,
        text_embed_2_dim=24,
        rope_axes_dim=(8, 8),
    )


GLYPHS = 4


def hunyuan_image_inputs(lengths: Lengths) -> dict[str, Any]:
    return {
        "hidden_states": _latent(lengths),
        "encoder_hidden_states": _text(lengths),
        "encoder_attention_mask": _mask(lengths),
        "encoder_hidden_states_2": torch.randn(len(lengths), GLYPHS, 24),
        "encoder_attention_mask_2": torch.arange(GLYPHS) < torch.arange(len(lengths))[:, None],
        "timestep": _time(lengths, 500.0),
    }


def flux3() -> nn.Module:
    return diffusers.Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


REFERENCES = 9


def flux3_inputs(lengths: Lengths) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(len(lengths), IMAGE, 4),
        "encoder_hidden_states": _text(lengths),
        "timestep": _time(lengths),
        "img_ids": grid_ids(4),
        "txt_ids": torch.zeros(max(lengths), 4),
        "image_cond_hidden_states": torch.randn(len(lengths), REFERENCES, 4),
        "image_cond_ids": grid_ids(4)[:REFERENCES] + 1,
    }


def krea2() -> nn.Module:
    return diffusers.Krea2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )


def krea2_inputs(lengths: Lengths) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(len(lengths), IMAGE, 4),
        "encoder_hidden_states": torch.randn(len(lengths), max(lengths), 2, 32),
        "encoder_attention_mask": _mask(lengths),
        "timestep": _time(lengths),
        "position_ids": grid_ids(3, text=max(lengths)),
    }


def qwen_image_edit_inputs(lengths: Lengths) -> dict[str, Any]:
    shapes = [(1, ROWS, COLUMNS), (1, 3, 4), (1, 2, 2)]  # the image, then two references
    return {
        "hidden_states": torch.randn(len(lengths), IMAGE + 16, 4),
        "encoder_hidden_states": _text(lengths),
        "encoder_hidden_states_mask": _mask(lengths),
        "timestep": _time(lengths),
        "img_shapes": [shapes] * len(lengths),
    }


def sana() -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=32,
        patch_size=2,
    )


def sana_inputs(lengths: Lengths) -> dict[str, Any]:
    mask = _mask(lengths).float()
    return {**aura_flow_inputs(lengths), "encoder_attention_mask": mask, "timestep": _time(lengths, 500.0)}


def lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=32,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(32, 32, 32),
        cap_feat_dim=32,
    )


def lumina2_inputs(lengths: Lengths) -> dict[str, Any]:
    # Longer than every text: the model drops what its mask excludes.
    text = torch.randn(len(lengths), 12, 32)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    return {
        "hidden_states": _latent(lengths),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask.long(),
        "timestep": _time(lengths),
    }


def chroma() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )


def chroma_inputs(lengths: Lengths) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(len(lengths), IMAGE, 4),
        "encoder_hidden_states": _text(lengths),
        "timestep": _time(lengths),
        "img_ids": grid_ids(3),
        "txt_ids": torch.zeros(max(lengths), 3),
    }


def chroma_inputs_of_pipeline(lengths: Lengths) -> dict[str, Any]:
    """With the mask as its pipelines make it: of floats, which the attention adds to the scores."""
    mask = torch.cat([_mask(lengths), torch.ones(len(lengths), IMAGE)], dim=1).float()
    return {**chroma_inputs(lengths), "attention_mask": mask}


def ovis() -> nn.Module:
    return diffusers.OvisImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def longcat() -> nn.Module:
    return diffusers.LongCatImageTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )


def longcat_inputs(lengths: Lengths) -> dict[str, Any]:
    """As of LongCat-Image-Edit: the tokens of the reference image follow the image, with another modality."""
    reference = grid_ids(3)[:REFERENCES]
    reference[:, 0] = 1
    inputs = chroma_inputs(lengths)
    inputs["hidden_states"] = torch.randn(len(lengths), IMAGE + REFERENCES, 4)
    return {**inputs, "img_ids": torch.cat([inputs["img_ids"], reference])}


def aura_flow() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=32,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )


def aura_flow_inputs(lengths: Lengths) -> dict[str, Any]:
    return {
        "hidden_states": _latent(lengths),
        "encoder_hidden_states": _text(lengths),
        "timestep": _time(lengths),
    }


def hidream() -> nn.Module:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 24],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 4, 8),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
    )


PADDED = 64  # image tokens of HiDream, whose images that are not square are padded, and of Z-Image


def hidream_inputs(lengths: Lengths) -> dict[str, Any]:
    return {
        "hidden_states": _latent(lengths),
        "timesteps": _time(lengths, 500.0),
        "encoder_hidden_states_t5": _text(lengths),
        "encoder_hidden_states_llama3": torch.randn(2, len(lengths), max(lengths), 24),
        "pooled_embeds": torch.randn(len(lengths), 16),
    }
