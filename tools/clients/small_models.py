"""The pipelines that a client's scripts run: small transformers, random text embeddings, and no decoder."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

TESTS = Path(__file__).resolve().parents[2] / "tests"
for folder in ("integrations", "prompts"):
    sys.path.append(str(TESTS / folder))

import small_pipelines  # noqa: E402
from local_tokenizers import qwen_tokenizer  # noqa: E402

LENGTH = 80  # text tokens of Qwen-Image
SIZE = small_pipelines.SIZE  # rows and columns of SD3's latents


@dataclass
class Model:
    """A pipeline, and what its script needs to run it.

    Attributes:
        resolution: of the images, eight times that of the latents.
        clip_range, rate: chosen so that the second update clips some samples.
        names: further names of the script's ``main``.
    """

    pipeline: Any
    resolution: int
    clip_range: float
    rate: float
    names: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=lambda: [*small_pipelines.PROMPTS, *small_pipelines.PROMPTS])

    def embeddings(self, seed: int) -> tuple[Tensor, Tensor]:
        return small_pipelines.embeddings(len(self.prompts), seed)


class Decoder(nn.Module):
    """Returns latents as an image."""

    dtype = torch.float32

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0, **config)

    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (latents[:, :3].clamp(-1, 1),)


def _with_decoder(pipeline: Any, **config: Any) -> Any:
    vars(pipeline)["vae"] = Decoder(**config)
    made = type(pipeline)
    pipeline.__class__ = type(made.__name__, (made,), {"_execution_device": torch.device("cpu")})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd3_model() -> Model:
    model = Model(_with_decoder(small_pipelines.sd3_pipeline()), 8 * small_pipelines.SIZE, 2e-3, 1e-3)
    embeds, pooled = model.embeddings(2)
    model.names = {
        f"{use}_neg_{name}": value
        for use in ("sample", "train")
        for name, value in (("prompt_embeds", embeds), ("pooled_prompt_embeds", pooled))
    }
    return model


def flux_model() -> Model:
    pipeline = _with_decoder(small_pipelines.flux_pipeline())
    model = Model(pipeline, 128, 2e-3, 1e-3)
    text = model.embeddings(1)
    ids = torch.zeros(text[0].shape[1], 3)
    pipeline.encode_prompt = lambda **_: (*text, ids)
    return model


def qwen_model() -> Model:
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipeline = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=None, text_encoder=None,
        tokenizer=qwen_tokenizer(), transformer=small_pipelines._randomised(transformer),
    )  # fmt: skip
    before = pipeline.prompt_template_encode.partition("{}")[0]
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(before)["input_ids"])
    _with_decoder(pipeline, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, z_dim=4)
    model = Model(pipeline, 128, 2e-3, 1e-3)
    generator = torch.Generator().manual_seed(1)
    count = len(model.prompts)
    embeds = torch.randn(2 * count, LENGTH, 32, generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH]] * count + [[5]] * count)
    pipeline.encode_prompt = lambda **_: (embeds, mask.long())
    return model


MODELS = {"sd3": sd3_model, "flux": flux_model, "qwen": qwen_model}
