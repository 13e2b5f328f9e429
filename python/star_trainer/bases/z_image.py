"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_trainer.bases.base import Base, Text, padded


class ZImage(Base):
    """Guidance is classifier-free: 1 + ``guidance_scale`` of the pipeline. The transformer predicts the negative
    velocity at 1 - sigma."""

    # As in Flow-Factory.
    lora_targets = (
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )

    def encode(self, prompts: list[str], device: torch.device) -> Text:
        rows, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return padded(rows)

    def predict(self, model: Any, latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
        images = list(latents[:, :, None].unbind())
        found = model(images, (1000 - timestep) / 1000, text.unpadded(), return_dict=False)[0]
        return -torch.stack(found)[:, :, 0]

    def combine(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        return conditional + (self.guidance - 1) * (conditional - unconditional)

    @property
    def channels(self) -> int:
        return int(self.pipeline.transformer.in_channels)

    @property
    def default_side(self) -> int:
        return 1024 // int(self.pipeline.vae_scale_factor)
