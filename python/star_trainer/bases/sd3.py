"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_trainer.bases.base import Base, Text


class StableDiffusion3(Base):
    """Guidance is classifier-free; the text has a fixed length, of which T5's part is ``text_length``."""

    # The eight attention projections of a joint block, as in Flow-GRPO.
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )

    def encode(self, prompts: list[str], device: torch.device) -> Text:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=device,
        )
        return Text(tokens, pooled)

    def predict(self, model: Any, latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
        velocity: Tensor = model(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]
        return velocity

    def sigmas(self, steps: int) -> None:
        return None

    @property
    def channels(self) -> int:
        return int(self.pipeline.transformer.config.in_channels)

    @property
    def patch(self) -> int:
        return int(self.pipeline.transformer.config.patch_size)
