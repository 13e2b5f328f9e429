"""A pipeline of each base with tiny random weights, saved in a folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from star_trainer.small import SMALL
from star_trainer.small.pipeline import build

sys.path.append(str(Path(__file__).resolve().parents[1] / "prompts"))

from local_tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer

WIDTH = 32  # of text embeddings
SIDE = 16  # pixels
ROWS = 4  # of tokens
LENGTHS = {"sd3": 1, "flux": 40, "qwen_image": 200, "z_image": 100}  # tokens
GUIDANCE = {"sd3": 4.5, "flux": 3.5, "qwen_image": 4.0, "z_image": 5.0}


def randomised(model: Any) -> Any:
    """Random weights that give distinct maps and let text affect all outputs; some are zero at initialisation."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
        else:
            nn.init.normal_(parameter, std=0.8 * parameter[0].numel() ** -0.5)
    return model.eval()


def sd3() -> Any:
    pipeline = build(replace(SMALL, size=SIDE, heads=2, blocks=2, text_width=WIDTH))
    randomised(pipeline.transformer)
    pipeline.register_modules(vae=autoencoder(SMALL.latent_channels))
    return pipeline


def autoencoder(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.4,
        shift_factor=0.1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip_encoder(tokenizer: Any) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.CLIPTextModel(config)


def flux(**options: Any) -> Any:
    t5 = transformers.T5Config(
        vocab_size=512, d_model=WIDTH, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        **{"guidance_embeds": True, **options},
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(4),
        text_encoder=clip_encoder(clip_tokenizer()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=randomised(transformers.T5EncoderModel(t5)),
        tokenizer_2=t5_tokenizer(),
        transformer=randomised(transformer),
    )


def qwen_sizes(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1200,
    }


def qwen_image() -> Any:
    tokenizer = qwen_tokenizer()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**qwen_sizes(tokenizer), "rope_scaling": rope, "rope_parameters": rope}, vision_config=vision
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 1.5, 2.0, 0.5],
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=vae,
        text_encoder=randomised(transformers.Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
    )


def z_image() -> Any:
    tokenizer = qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8],
        axes_lens=[1200, 32, 32],
    )
    config = transformers.Qwen3Config(**qwen_sizes(tokenizer), head_dim=16)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4),
        text_encoder=randomised(transformers.Qwen3Model(config)),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
    )


PIPELINES = {"sd3": sd3, "flux": flux, "qwen_image": qwen_image, "z_image": z_image}


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    PIPELINES[name]().save_pretrained(folder / name)
    return folder / name


def settings(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Settings of the driver for a pipeline in a folder, by section."""
    model = {"path": str(folder), "text_length": LENGTHS[name], "lora_rank": 4}
    return {"model": model, "rollout": {"guidance": GUIDANCE[name], "resolution": SIDE}}
