"""The memory and the arithmetic of the driver's presets, counted without a GPU: python -m tools.recipe_costs

Each transformer is built on PyTorch's meta device, which knows shapes and holds no numbers. The command counts the FLOP
of a forward pass, and the bytes of the tensors that the forward pass of a training step saves for its backward pass,
all in bfloat16 and with the adapters of the preset. Autocast keeps some of them in float32, so a run needs more. No
time is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reporting.tables import markdown_table
from benchmarks.variants import sd3_model
from star_trainer import command
from star_trainer.bases import Base, Text, base_of
from star_trainer.bases.base import SCHEDULER

GIB = 1024**3
PIXELS_PER_LATENT = 8
BATCH = 12
META = torch.device("meta")


def _sd3() -> Any:
    size = sd3_model.Size(blocks=24, latent=128, text=0, groups=1, group=1, steps=1)
    return sd3_model.build(size, torch.bfloat16, META)


@dataclass(frozen=True)
class Model:
    """A published model with a preset.

    Args:
        build: its transformer; the defaults of diffusers' classes are the published sizes.
        text: number of text tokens; without a fixed length, of a long prompt.
        text_width, pooled_width: of the text embeddings.
        encoders, vae: parameters of the text encoders and of the autoencoder, in billions, as published.
    """

    preset: str
    pipeline: str
    build: Callable[[], Any]
    text: int
    text_width: int
    pooled_width: int
    encoders: float
    vae: float


MODELS = {
    "SD3.5-Medium": Model(
        "sd35m-pickscore",
        "StableDiffusion3Pipeline",
        _sd3,
        77 + 128,  # CLIP's tokens and T5's
        sd3_model.TEXT_WIDTH,
        sd3_model.POOLED_WIDTH,
        5.6,
        0.08,
    ),
    "FLUX.1-dev": Model(
        "flux1-pickscore",
        "FluxPipeline",
        lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
        128,
        4096,
        768,
        4.9,
        0.08,
    ),
    "Qwen-Image": Model(
        "qwen-image-pickscore", "QwenImagePipeline", diffusers.QwenImageTransformer2DModel, 128, 3584, 0, 8.3, 0.13
    ),
    "Z-Image": Model(
        "z-image-pickscore", "ZImagePipeline", diffusers.ZImageTransformer2DModel, 128, 2560, 0, 4.0, 0.08
    ),
}


class Subject:
    """The transformer of a model with the adapters of its preset, for images of side x side pixels."""

    def __init__(self, name: str, side: int, *, checkpointing: bool = False) -> None:
        from peft import LoraConfig

        self.model = MODELS[name]
        config = command.parse(["--preset", self.model.preset])
        with META:
            self.transformer = self.model.build()
        self.transformer.requires_grad_(False)
        pipeline = type(self.model.pipeline, (), {"transformer": self.transformer})()
        pipeline.scheduler = type(SCHEDULER, (SimpleNamespace,), {})()
        self.base: Base = base_of(pipeline, text_length=1, guidance=config.rollout.guidance)
        adapters = LoraConfig(
            r=config.model.lora_rank,
            lora_alpha=config.model.lora_alpha,
            target_modules=list(self.base.lora_targets),
            exclude_modules=self.base.without_effect() or None,
        )
        self.transformer.add_adapter(adapters)
        self.transformer.to(torch.bfloat16).train()
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.side = side // PIXELS_PER_LATENT
        self.rows = 2 if self.base.doubled else 1  # of the transformer, for each sample
        self.bytes_per_weight = 20 if config.train.ema else 16  # of adapters: float32, gradients, moments, the average

    @property
    def parameters(self) -> tuple[int, int]:
        """Of the model and of its adapters."""
        adapters = sum(p.numel() for p in self.transformer.parameters() if p.requires_grad)
        return sum(p.numel() for p in self.transformer.parameters()) - adapters, adapters

    @property
    def blocks(self) -> int:
        """The number of blocks, which checkpointing recomputes one at a time."""
        lists = (module for module in self.transformer.children() if isinstance(module, nn.ModuleList))
        return sum(len(module) for module in lists)

    def run(self, rows: int) -> None:
        """A forward pass of so many rows."""
        empty = {"device": META, "dtype": torch.bfloat16}
        text = Text(
            torch.empty(rows, self.model.text, self.model.text_width, **empty),
            torch.empty(rows, self.model.pooled_width, **empty),
        )
        latents = torch.empty(rows, self.base.channels, self.side, self.side, **empty)
        self.base.predict(self.transformer, latents, torch.empty(rows, device=META), text)

    def flop(self) -> int:
        """The FLOP of the forward pass of one row, without adapters' gradients."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.run(1)
        return int(counter.get_total_flops())

    def saved(self, samples: int) -> int:
        """The bytes that a guided forward pass saves for the backward pass, without the model's parameters."""
        parameters = {parameter.untyped_storage()._cdata for parameter in self.transformer.parameters()}
        found: dict[int, tuple[Any, int]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                found[storage._cdata] = (storage, storage.nbytes())  # kept, so that no other storage has its address
            return tensor

        attention = torch.nn.functional.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = _flash
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                self.run(self.rows * samples)
        finally:
            torch.nn.functional.scaled_dot_product_attention = attention
        return sum(size for _, size in found.values())


class _Flash(torch.autograd.Function):
    """Saves what flash attention saves. The meta device would use the softmax matrix."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    return _Flash.apply(query, key, value)


def batches() -> str:
    """A table of SD3.5-Medium in the batches of its presets."""
    rows = {}
    for side in (512, 1024):
        plain, checkpointed = (Subject("SD3.5-Medium", side, checkpointing=flag) for flag in (False, True))
        rows[f"{side}²"] = [
            f"{plain.flop() / 1e12:.1f}",
            f"{plain.saved(1) / GIB:.1f}",
            f"{plain.saved(BATCH) / GIB:.0f}",
            f"{checkpointed.saved(BATCH) / GIB:.1f}",
        ]
    heads = [
        "TFLOP of a forward pass, one row",
        "GiB of activations, 1 sample",
        f"GiB, {BATCH} samples",
        f"GiB, {BATCH} samples, checkpointing",
    ]
    return markdown_table("SD3.5-Medium with guidance", heads, rows)


def models(side: int = 512) -> str:
    """A table of one sample of each model."""
    columns = {}
    for name, model in MODELS.items():
        plain, checkpointed = (Subject(name, side, checkpointing=flag) for flag in (False, True))
        weights, adapters = plain.parameters
        each = [2 * weights, 2e9 * model.encoders, 2e9 * model.vae, plain.bytes_per_weight * adapters]
        saved, kept = plain.saved(1), checkpointed.saved(1) + plain.saved(1) / plain.blocks
        least = each[0] + each[3] + max(each[1], kept)  # encoders do not run during an update
        columns[name] = [
            f"{weights / 1e9:.1f} billion",
            f"{adapters / 1e6:.0f} million",
            f"{plain.rows} x {plain.flop() / 1e12:.1f}",
            *(f"{size / GIB:.1f}" for size in (*each, saved, kept, sum(each) + saved, least)),
        ]
    labels = ["parameters", "parameters of the LoRA", "TFLOP of a forward pass", "transformer", "text encoders", "VAE"]
    labels += ["adapters", "activations", "activations, checkpointing", "sum", "sum, checkpointing and offloading"]
    rows = dict(zip(labels, map(list, zip(*columns.values(), strict=True)), strict=True))
    return markdown_table("GiB, unless a unit is named", list(columns), rows)


def main() -> None:
    print(batches())
    print()
    print(models())


if __name__ == "__main__":
    main()
