"""Sizes and settings of the small models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """All settings of the training of a small model.

    Attributes:
        size: height and width of the images in pixels, a multiple of 32.
        vae_channels: channels of the autoencoder at full resolution, at half resolution, and so on.
        latent_channels: channels of the latents; each but the first of vae_channels halves their resolution.
        heads: number of attention heads of the transformer, with 32 channels each.
        blocks: number of joint blocks of the transformer.
        text_width: channels of each of the two CLIP text encoders, which have two layers each.
        text_length: number of tokens of a prompt, including two special tokens.
        vae_steps, vae_batch, vae_learning_rate: training of the autoencoder.
        pool: number of images that are drawn and encoded once; the transformer trains on random batches of them.
        steps, batch, learning_rate, warmup: training of transformer and text encoders by flow matching.
        dropout: share of prompts that are replaced by the empty prompt, for classifier-free guidance.
        padded: share of batches with 256 zero embeddings in place of T5 (the default of diffusers) instead of one.
        ema: decay of the moving average of the weights, which is saved.
        text_share: share of scenes with a printed word.
        guidance: guidance scale for samples and metrics.
        sampling_steps: number of denoising steps for samples and metrics.
        seed: seed of weights, scenes and noise.
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
