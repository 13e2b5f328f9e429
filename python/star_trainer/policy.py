"""The trained model: a Stable Diffusion 3 pipeline whose transformer predicts velocities, with guidance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from star_kernels import pipelines
from star_trainer.config import Config
from star_trainer.weights import whole_weights

SHIPPED = Path(__file__).parent / "assets" / "small-sd3"
# The eight attention projections of a joint block, as in Flow-GRPO.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Text:
    """Text embeddings: ``tokens`` ``[B, L, D]`` and ``pooled`` ``[B, P]``."""

    tokens: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Any) -> Text:
        return Text(self.tokens[rows], self.pooled[rows])


class Policy:
    """The pipeline, its trained transformer and, for the KL term, the transformer before training.

    Attributes:
        transformer: the transformer, or its wrapper in distributed training.
        loaded: fingerprint of the pipeline before training.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.pipeline = load_pipeline(config.model.path, DTYPES[config.model.dtype])
        self.loaded = fingerprint(self.pipeline)
        self.pipeline.to(device)
        self.device, self.guidance = device, config.rollout.guidance
        self.text_length = config.model.text_length
        self.lora = config.model.lora_rank > 0
        for model in self.pipeline.components.values():
            if isinstance(model, nn.Module):
                model.requires_grad_(False).eval()
        self.transformer: Any = self.pipeline.transformer
        self._reference: Any = None
        if self.lora:
            self._add_adapters(config)
        else:
            if config.train.kl_coef > 0:
                self._reference = deepcopy(self.transformer)
            self.transformer.float().requires_grad_(True)
        if config.model.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self._unconditional: Text | None = None

    @property
    def model(self) -> Any:
        """The transformer without its distributed wrapper."""
        return self.pipeline.transformer

    def encode(self, prompts: Sequence[str]) -> Text:
        """One row per prompt; repeated prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        with torch.no_grad():
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=unique,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
                device=self.device,
            )
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=tokens.device)
        return Text(tokens, pooled)[rows]

    def velocity(self, latents: Tensor, timestep: float, text: Text, *, reference: bool = False) -> Tensor:
        """The velocity at latents ``[B, C, h, w]`` after guidance, in the transformer's dtype.

        With guidance, the transformer's batch is 2 B: the unconditional half, then the conditional half.

        Args:
            timestep: 1000 sigma.
            reference: use the model as it was before training (the KL reference model).
        """
        if reference and self._reference is not None:
            return self._guided(self._reference, latents, timestep, text)
        with self._adapters_off() if reference else nullcontext():
            return self._guided(self.transformer, latents, timestep, text)

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in 0..1, float32 on the CPU."""
        vae = self.pipeline.vae
        with torch.no_grad():
            scaled = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            return (vae.decode(scaled).sample.float() / 2 + 0.5).clamp(0, 1).cpu()

    def latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        """Channels, rows and columns of one sample.

        Raises:
            ValueError: the model does not support this resolution.
        """
        side = self.model.config.sample_size
        if resolution is not None:
            unit = self.pipeline.vae_scale_factor * self.model.config.patch_size
            if resolution < unit or resolution % unit:
                raise ValueError(f"rollout.resolution must be a multiple of {unit} for this model, got {resolution}")
            side = resolution // self.pipeline.vae_scale_factor
        return self.model.config.in_channels, side, side

    def export(self, folder: Path, *, write: bool) -> None:
        """Writes the trained weights in the format of diffusers: a LoRA file, or the folder of the transformer.

        All processes must call it, because weights may be sharded; only those with ``write`` write files.
        """
        state = whole_weights(self.transformer)
        if not write:
            return
        if self.lora:
            from peft import get_peft_model_state_dict

            adapters = get_peft_model_state_dict(self.model, state_dict=state)
            self.pipeline.save_lora_weights(folder, transformer_lora_layers=adapters, safe_serialization=True)
        else:
            from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

            self.model.save_config(folder / "transformer")
            save_file(state, folder / "transformer" / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def _guided(self, model: Any, latents: Tensor, timestep: float, text: Text) -> Tensor:
        guided = self.guidance > 1
        if guided:
            if self._unconditional is None:
                self._unconditional = self.encode([""])
            empty = self._unconditional[torch.zeros(len(latents), dtype=torch.int64, device=latents.device)]
            text = Text(torch.cat([empty.tokens, text.tokens]), torch.cat([empty.pooled, text.pooled]))
            latents = torch.cat([latents, latents])
        velocity = model(
            hidden_states=latents.to(self.pipeline.transformer.dtype),
            timestep=torch.full((len(latents),), timestep, device=latents.device),
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]
        if not guided:
            return velocity
        unconditional, conditional = velocity.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def _add_adapters(self, config: Config) -> None:
        from peft import LoraConfig

        torch.manual_seed(config.train.seed)
        self.transformer.add_adapter(
            LoraConfig(
                r=config.model.lora_rank,
                lora_alpha=config.model.lora_alpha,
                init_lora_weights="gaussian",
                target_modules=list(LORA_TARGETS),
            )
        )
        for parameter in self.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        """Sets the adapters' scale to zero: disabling them by peft also changes requires_grad, which breaks FSDP2."""
        from peft.tuners.lora import LoraLayer

        if not self.lora:
            raise RuntimeError("the KL reference model is kept only if train.kl_coef is above 0")
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.scale_layer(0.0)
        try:
            yield
        finally:
            for layer in layers:
                layer.unscale_layer()


def fingerprint(pipeline: Any) -> str:
    """A digest of a few values of each weight, independent of the weights' names and order, which libraries change."""
    models = [model for model in pipeline.components.values() if isinstance(model, nn.Module)]
    found = []
    for parameter in chain.from_iterable(model.parameters() for model in models):
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // 8)].float().cpu()
        found.append(hashlib.sha256(f"{list(parameter.shape)} {values.tolist()}".encode()).digest())
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()


def load_pipeline(path: str, dtype: torch.dtype) -> Any:
    """Loads a StableDiffusion3Pipeline; "small" is the one that ships with the package.

    Raises:
        ValueError: the pipeline does not exist or is of another kind.
    """
    from diffusers.utils import logging

    logging.disable_progress_bar()
    folder = str(SHIPPED) if path == "small" else path
    if (path == "small" or "/" not in path or path.startswith((".", "/"))) and not Path(folder).is_dir():
        raise ValueError(f"model.path must be 'small', a folder or a hub id (owner/name), got {path!r}: no such folder")
    try:
        pipeline = pipelines.load_pipeline(folder, dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path: cannot load {path!r}: {error}") from error
    if not any(cls.__name__ == "StableDiffusion3Pipeline" for cls in type(pipeline).__mro__):
        raise ValueError(f"model.path must be a StableDiffusion3Pipeline, {path!r} is a {type(pipeline).__name__}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
