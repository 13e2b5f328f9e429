"""The models of a recipe with random weights, as a StableDiffusion3Pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import models, pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from star_trainer.scenes import vocabulary
from star_trainer.small.recipe import Recipe

START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
GROUPS = 8  # groups of the autoencoder's group norms


def build(recipe: Recipe) -> Any:
    """The pipeline, in training mode. Its T5 slot is empty."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe.text_length)
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=build_transformer(recipe),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=build_autoencoder(recipe),
        text_encoder=build_text_encoder(recipe, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(recipe, tokenizer),
        tokenizer_2=build_tokenizer(recipe.text_length),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_tokenizer(length: int) -> Any:
    """A CLIP tokenizer: each word of the scenes is one token, and other words are split into several tokens.

    The merges are constructed word by word, because the trainer of the tokenizers package breaks ties at random.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*alphabet, *(letter + END_OF_WORD for letter in alphabet)])
    merges: Any = []  # pairs, which CLIPTokenizer accepts but does not declare
    for word in vocabulary():
        numbered = {piece: number for number, piece in enumerate(pieces)}
        first, *rest = (t.value for t in models.BPE(numbered, merges, end_of_word_suffix=END_OF_WORD).tokenize(word))
        for piece in rest:
            merges.append((first, piece))
            first += piece
            pieces[first] = None
    numbered = {piece: number for number, piece in enumerate([*pieces, START, END])}
    return CLIPTokenizer(vocab=numbered, merges=merges, model_max_length=length)


def build_transformer(recipe: Recipe) -> Any:
    return SD3Transformer2DModel(
        sample_size=recipe.latent_size,
        patch_size=2,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        num_layers=recipe.blocks,
        attention_head_dim=32,
        num_attention_heads=recipe.heads,
        joint_attention_dim=2 * recipe.text_width,
        caption_projection_dim=recipe.width,
        pooled_projection_dim=2 * recipe.text_width,
        pos_embed_max_size=recipe.latent_size // 2,
        qk_norm="rms_norm",
    )


def build_autoencoder(recipe: Recipe) -> Any:
    levels = len(recipe.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=GROUPS,
        sample_size=recipe.size,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_text_encoder(recipe: Recipe, tokenizer: Any) -> Any:
    """The pooled output is zero, so that the text affects the image only through attention."""
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            projection_dim=recipe.text_width,
            num_hidden_layers=2,
            num_attention_heads=recipe.text_width // 32,
            max_position_embeddings=recipe.text_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    nn.init.zeros_(model.text_projection.weight).requires_grad_(False)
    return model
