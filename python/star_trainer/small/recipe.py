"""Sizes and settings of the small models, each with the command that reproduces it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run depends on.

    Attributes:
        size: rows and columns of the pictures, a multiple of 32.
        vae_channels: channels of the autoencoder at full and at half resolution (and so on).
        latent_channels: channels of the latent, whose resolution is halved by each but the first of vae_channels.
        heads: attention heads of the transformer, of 32 channels each.
        blocks: joint blocks of the transformer.
        text_width: channels of each of the two CLIP text encoders, of two layers each.
        text_length: tokens of a prompt, with its two special ones.
        vae_steps, vae_batch, vae_learning_rate: training of the autoencoder.
        pool: pictures that are drawn and encoded once; the transformer trains on them and their flips in no order.
        steps, batch, learning_rate, warmup: training of transformer and text encoders by flow matching.
        dropout: share of prompts left empty, for classifier-free guidance.
        padded: share of batches with the 256 zeros that diffusers puts in T5's place by default, instead of one.
        ema: decay of the average of the weights, which is what is kept.
        text_share: share of printed words among the scenes.
        guidance: scale for samples and metrics.
        sampling_steps: denoising steps for samples and metrics.
        seed: of everything.
    """

    size: int = 32
    vae_channels: tuple[int, ...] = (16, 32)
    latent_channels: int = 12
    heads: int = 4
    blocks: int = 4
    text_width: int = 64
    text_length: int = 16
    vae_steps: int = 1200
    vae_batch: int = 32
    vae_learning_rate: float = 3e-3
    pool: int = 49152
    steps: int = 5000
    batch: int = 32
    learning_rate: float = 1.5e-3
    warmup: int = 200
    dropout: float = 0.1
    padded: float = 0.04
    ema: float = 0.999
    text_share: float = 0.4
    guidance: float = 2.5
    sampling_steps: int = 16
    seed: int = 0

    @property
    def width(self) -> int:
        return 32 * self.heads

    @property
    def latent_size(self) -> int:
        return self.size >> (len(self.vae_channels) - 1)


SMALL = Recipe()
LARGE = Recipe(
    size=64,
    vae_channels=(32, 64),
    heads=12,
    blocks=12,
    text_width=192,
    vae_steps=5000,
    vae_batch=128,
    pool=262144,
    steps=60000,
    batch=256,
    learning_rate=1e-3,
    warmup=1000,
    ema=0.9995,
)
