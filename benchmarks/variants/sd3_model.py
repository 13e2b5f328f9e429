"""SD3.5-Medium's transformer with random weights, and text embeddings in place of its encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from benchmarks.timing.harness import Extent

TEXT_WIDTH = 4096
POOLED_WIDTH = 2048
PATCH = 2
CHANNELS = 16
DUAL_ATTENTION_BLOCKS = 13  # the first ones of SD3.5-M also attend within the image alone
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Size:
    """How much of the model and of the image there is."""

    blocks: int
    latent: int  # latent rows and columns
    text: int  # text tokens
    groups: int  # prompts a step
    group: int  # samples a prompt
    steps: int

    @property
    def grid(self) -> int:
        """Patch rows and columns."""
        return self.latent // PATCH

    @property
    def image(self) -> int:
        """Image tokens."""
        return self.grid**2

    @property
    def batch(self) -> int:
        return self.groups * self.group


def size_for(device: torch.device, batch: int | None, extent: Extent) -> Size:
    """All 24 blocks at 512² on a GPU; one block, or two in a thorough run, at 256² on a CPU.

    Samples come in groups of two a prompt.
    """
    groups = max(1, (batch or (4 if device.type == "cuda" else 2)) // 2)
    if extent == "quick":
        return Size(blocks=1, latent=8, text=32, groups=1, group=2, steps=2)
    if device.type == "cuda":
        return Size(blocks=24, latent=64, text=333, groups=groups, group=2, steps=4)
    return Size(blocks=2 if extent == "thorough" else 1, latent=32, text=77, groups=groups, group=2, steps=2)


def build(size: Size, dtype: torch.dtype, device: torch.device) -> Any:
    """The transformer; only its attention projections require grad."""
    diffusers.utils.logging.set_verbosity_error()  # it warns of every cast of a model that was not loaded from a file
    torch.manual_seed(0)
    with torch.device(device):
        transformer: Any = SD3Transformer2DModel(
            sample_size=size.latent,
            patch_size=PATCH,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=size.blocks,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=1536,
            pooled_projection_dim=POOLED_WIDTH,
            pos_embed_max_size=size.grid,  # SD3.5-M has 384, of which it takes the middle; that takes seconds to make
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(min(size.blocks, DUAL_ATTENTION_BLOCKS))),
        )
    transformer.to(device, dtype).requires_grad_(False)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(any(f".{projection}." in name for projection in PROJECTIONS))
    return transformer


class TextEmbeddings:
    """A fixed random embedding for each token id, so that equal words look equal to the model."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.known: dict[int, Tensor] = {}

    def __call__(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """``[B, L, 4096]`` for the tokens and ``[B, 2048]`` for the prompt as a whole."""
        tokens = torch.stack([torch.stack([self._embed(i) for i in row]) for row in ids])
        return tokens, tokens[..., :POOLED_WIDTH].float().mean(dim=1).to(self.dtype)

    def _embed(self, token: int) -> Tensor:
        if token not in self.known:
            generator = torch.Generator().manual_seed(token)
            self.known[token] = torch.randn(TEXT_WIDTH, generator=generator).to(self.device, self.dtype)
        return self.known[token]
