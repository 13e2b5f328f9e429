"""Trains the autoencoder and normalises its latents to mean zero and variance one."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from star_trainer.scenes import Scene, draw, sample_scene
from star_trainer.small.recipe import Recipe

KL = 1e-5  # weight of the KL divergence from the standard normal distribution, per latent value


def scenes(recipe: Recipe, seed: str, count: int) -> list[Scene]:
    """Random scenes of both tasks, seeded by the arguments."""
    rng = random.Random(f"{seed} {recipe.seed}")
    return [sample_scene(rng, "text" if rng.random() < recipe.text_share else "composition") for _ in range(count)]


def images_of(drawn: list[Scene], recipe: Recipe) -> Tensor:
    """``[N, 3, S, S]`` in -1..1."""
    return torch.stack([draw(scene, recipe.size) for scene in drawn]) * 2 - 1


def train_autoencoder(vae: Any, recipe: Recipe, device: torch.device) -> float:
    """Trains the autoencoder on random scenes. Returns the mean absolute error of reconstructions in 0..1."""
    vae.to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), recipe.vae_learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.vae_learning_rate, recipe.vae_steps, pct_start=0.1, anneal_strategy="cos"
    )
    bar = tqdm(range(recipe.vae_steps), desc="autoencoder", mininterval=2)
    for step in bar:
        images = images_of(scenes(recipe, f"autoencoder {step}", recipe.vae_batch), recipe).to(device)
        posterior = vae.encode(images).latent_dist
        rebuilt = vae.decode(posterior.sample(torch.Generator(device).manual_seed(step))).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = F.l1_loss(rebuilt, images) + F.mse_loss(rebuilt, images) + KL * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval()
    return _calibrate(vae, recipe, device)


@torch.no_grad()
def encode(vae: Any, drawn: list[Scene], recipe: Recipe, device: torch.device, batch: int = 256) -> Tensor:
    """Scaled latents ``[N, C, h, w]`` of scenes, on the CPU."""
    parts = []
    for start in tqdm(range(0, len(drawn), batch), desc="latents", mininterval=2, disable=len(drawn) <= batch):
        images = images_of(drawn[start : start + batch], recipe).to(device)
        mode = vae.encode(images).latent_dist.mode()
        parts.append(((mode - vae.config.shift_factor) * vae.config.scaling_factor).cpu())
    return torch.cat(parts)


@torch.no_grad()
def _calibrate(vae: Any, recipe: Recipe, device: torch.device) -> float:
    images = images_of(scenes(recipe, "calibration", 512), recipe).to(device)
    latents = vae.encode(images).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return (vae.decode(latents).sample - images).abs().mean().item() / 2
