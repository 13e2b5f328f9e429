"""FLUX.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_trainer.bases.base import Base, Text, packed, unpacked


class Flux(Base):
    """Guidance is an input of FLUX.1-dev's transformer; that of FLUX.1-schnell has no guidance."""

    # Of the double-stream blocks and, for queries, keys and values, of the single-stream blocks, as in Flow-GRPO.
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def __init__(self, pipeline: Any, *, text_length: int, guidance: float) -> None:
        super().__init__(pipeline, text_length=text_length, guidance=guidance)
        self.doubled = False
        self._ids: dict[tuple[int, int, torch.device], Tensor] = {}
        if not pipeline.transformer.config.guidance_embeds and guidance != 1:
            raise ValueError(
                "rollout.guidance must be 1 for a FluxPipeline whose transformer has no guidance (guidance_embeds is "
                f"False, as in FLUX.1-schnell), got {guidance}"
            )

    def encode(self, prompts: list[str], device: torch.device) -> Text:
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, max_sequence_length=self.text_length, device=device
        )
        return Text(tokens, pooled)

    def predict(self, model: Any, latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
        embeds = self.pipeline.transformer.config.guidance_embeds
        tokens: Tensor = model(
            hidden_states=packed(latents),
            timestep=timestep / 1000,
            guidance=torch.full_like(timestep, self.guidance) if embeds else None,
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            txt_ids=latents.new_zeros(text.tokens.shape[1], 3),
            img_ids=self._image_ids(latents),
            return_dict=False,
        )[0]
        return unpacked(tokens, latents)

    def _image_ids(self, latents: Tensor) -> Tensor:
        """The same tensor in each pass: a capture reads the grid from its values once, which waits for the device."""
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        key = rows, columns, latents.device
        if key not in self._ids:
            grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            self._ids[key] = torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).flatten(0, 1).to(latents)
        return self._ids[key]
