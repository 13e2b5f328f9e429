"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_trainer.bases.base import Base, Text, packed, unpacked


class QwenImage(Base):
    """Guidance is classifier-free, and the norm of each token is then that of the conditional prediction."""

    # As in Flow-GRPO.
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    text_limit = 1024

    def encode(self, prompts: list[str], device: torch.device) -> Text:
        tokens, mask = self.pipeline.encode_prompt(prompts, device=device, max_sequence_length=self.text_length)
        whole = torch.full((len(tokens),), tokens.shape[1])
        return Text(tokens, lengths=whole if mask is None else mask.sum(dim=1).cpu())

    def predict(self, model: Any, latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        tokens: Tensor = model(
            hidden_states=packed(latents),
            timestep=timestep / 1000,
            encoder_hidden_states=text.tokens,
            encoder_hidden_states_mask=text.mask,
            img_shapes=[[(1, rows, columns)]] * len(latents),
            return_dict=False,
        )[0]
        return unpacked(tokens, latents)

    def combine(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        guided, along = packed(super().combine(unconditional, conditional)), packed(conditional)
        norms = along.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpacked(guided * norms, conditional)

    def decode(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        mean, std = (
            latents.new_tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        images: Tensor = self.pipeline.vae.decode(latents[:, :, None] * std + mean).sample[:, :, 0]
        return images

    def without_effect(self) -> list[str]:
        """The last block's own output of the text, which no later block reads."""
        last = f"transformer_blocks.{len(self.pipeline.transformer.transformer_blocks) - 1}"
        parts = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        return [f"{last}.{part}" for part in parts]
