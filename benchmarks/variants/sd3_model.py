"""The transformer of SD3.5-Medium with random weights, and random text embeddings in place of its text encoders."""

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
DUAL_ATTENTION_BLOCKS = 13  # first blocks of SD3.5-M, which also have an attention of the image tokens only
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Size:
    """Size of the model, of the images and of the batch."""

    blocks: int
    latent: int  # rows and columns of the latent
    text: int  # text tokens
    groups: int  # prompts per step
    group: int  # samples per prompt
    steps: int

    @property
    def grid(self) -> int:
        """Number of rows and of columns of patches."""
        return self.latent // PATCH

    @property
    def image(self) -> int:
        """Number of image tokens."""
        return self.grid**2

    @property
    def batch(self) -> int:
        return self.groups * self.group


def size_for(device: torch.device, batch: int | None, extent: Extent) -> Size:
    """All 24 blocks at 512² on a GPU; one block, or two in a thorough run, at 256² on a CPU. Two samples per group."""
    groups = max(1, (batch or (4 if device.type == "cuda" else 2)) // 2)
    if extent == "quick":
        return Size(blocks=1, latent=8, text=32, groups=1, group=2, steps=2)
    if device.type == "cuda":
        return Size(blocks=24, latent=64, text=333, groups=groups, group=2, steps=4)
    return Size(blocks=2 if extent == "thorough" else 1, latent=32, text=77, groups=groups, group=2, steps=2)


def build(size: Size, dtype: torch.dtype, device: torch.device) -> Any:
    """Builds the transformer. Only its attention projections require grad."""
    diffusers.utils.logging.set_verbosity_error()  # no warning about casting a model that was not loaded from a file
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
            pos_embed_max_size=size.grid,  # 384 in SD3.5-M, which takes seconds to compute
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(min(size.blocks, DUAL_ATTENTION_BLOCKS))),
        )
    transformer.to(device, dtype).requires_grad_(False)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(any(f".{projection}." in name for projection in PROJECTIONS))
    return transformer


class TextEmbeddings:
    """Fixed random embeddings, one for each token id."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.known: dict[int, Tensor] = {}

    def __call__(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Returns embeddings of the tokens ``[B, L, 4096]`` and of the prompts ``[B, 2048]``."""
        tokens = torch.stack([torch.stack([self._embed(i) for i in row]) for row in ids])
        return tokens, tokens[..., :POOLED_WIDTH].float().mean(dim=1).to(self.dtype)

    def _embed(self, token: int) -> Tensor:
        if token not in self.known:
            generator = torch.Generator().manual_seed(token)
            self.known[token] = torch.randn(TEXT_WIDTH, generator=generator).to(self.device, self.dtype)
        return self.known[token]
