"""Trains the transformer and the text encoders together by flow matching (rectified flow, as Stable Diffusion 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from star_trainer.small.autoencoder import encode, scenes
from star_trainer.small.recipe import Recipe

T5_DEFAULT = 256  # default number of zero embeddings that diffusers inserts for a missing T5


def train_flow(pipeline: Any, recipe: Recipe, device: torch.device) -> float:
    """Trains in place and leaves the averaged weights in the pipeline. Returns the mean loss of the last tenth."""
    pool = scenes(recipe, "pool", recipe.pool)
    latents = encode(pipeline.vae, pool, recipe, device)
    ids = tokens(pipeline, [scene.prompt for scene in pool])
    empty = tokens(pipeline, [""])
    modules = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]).to(device).train()
    average = deepcopy(modules).eval()
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(recipe.seed)
    losses = torch.zeros(recipe.steps)
    bar = tqdm(range(recipe.steps), desc="flow matching", mininterval=2)
    for step in bar:
        chosen = torch.randint(recipe.pool, (recipe.batch,), generator=generator)
        data = latents[chosen].to(device)
        dropped = torch.rand(recipe.batch, generator=generator) < recipe.dropout
        text = torch.where(dropped[:, None], empty, ids[chosen]).to(device)
        noise = torch.randn(data.shape, generator=generator).to(device)
        sigma = torch.sigmoid(torch.randn(recipe.batch, generator=generator)).to(device)
        length = T5_DEFAULT if torch.rand((), generator=generator) < recipe.padded else 1
        noisy = torch.lerp(data, noise, sigma[:, None, None, None])
        velocity = predict(modules, noisy, sigma, text, length)
        loss = (velocity - (noise - data)).square().mean()
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * rate(step, recipe)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        _follow(average.parameters(), modules.parameters(), min(recipe.ema, (1 + step) / (10 + step)))
        losses[step] = loss.detach()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{losses[max(0, step - 99) : step + 1].mean().item():.4f}")
    modules.load_state_dict(average.state_dict())
    modules.eval()
    return losses[-max(1, recipe.steps // 10) :].mean().item()


def tokens(pipeline: Any, prompts: list[str]) -> Tensor:
    """Token ids, int64 ``[N, L]``; both encoders have the same tokenizer."""
    found = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return found.input_ids


def predict(modules: nn.ModuleList, noisy: Tensor, sigma: Tensor, ids: Tensor, t5_length: int) -> Tensor:
    """The velocity; text is embedded as in StableDiffusion3Pipeline."""
    transformer, *encoders = modules
    states = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    text = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
    text = torch.cat([text, text.new_zeros(len(text), t5_length, text.shape[-1])], dim=1)
    pooled = torch.cat([state.text_embeds for state in states], dim=-1)
    return transformer(
        hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=text, pooled_projections=pooled
    ).sample


def rate(step: int, recipe: Recipe) -> float:
    """Factor of the learning rate: linear warm-up, then cosine decay to zero."""
    done = max(0.0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    return min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _follow(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    torch._foreach_lerp_(list(average), [p.detach() for p in current], 1 - decay)
