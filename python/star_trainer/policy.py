"""The trained model: a pipeline whose transformer predicts velocities, with guidance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from star_kernels import pipelines
from star_trainer.bases import Text, base_of
from star_trainer.config import Config
from star_trainer.schedule import Schedule, schedule_of
from star_trainer.weights import whole_weights

SHIPPED = Path(__file__).parent / "assets" / "small-sd3"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Policy:
    """The pipeline, its trained transformer and, for the KL term, the transformer before training.

    Attributes:
        transformer: the transformer, or its wrapper in distributed training.
        loaded: fingerprint of the pipeline before training.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.pipeline = load_pipeline(config.model.path, DTYPES[config.model.dtype])
        self.loaded = fingerprint(self.pipeline)
        settings = config.model
        self.base = base_of(self.pipeline, text_length=settings.text_length, guidance=config.rollout.guidance)
        self.device, self.resolution = device, config.rollout.resolution
        self.text_length = settings.text_length
        self._offloaded, self._kept_texts = settings.offload, settings.kept_texts
        if self._offloaded and device.type == "cpu":
            raise ValueError("model.offload must be false on a CPU, where weights are in main memory already, got true")
        self._texts: dict[str, Text] = {}  # the latest prompts' embeddings, in main memory
        parts = {n: part for n, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        self._encoders = [part for name, part in parts.items() if name not in ("transformer", "vae")]
        self.pipeline.transformer.to(device)
        if not self._offloaded:
            self.pipeline.to(device)
        self.lora = settings.lora_rank > 0
        self._lora_scale = settings.lora_alpha / max(1, settings.lora_rank)
        for part in parts.values():
            part.requires_grad_(False).eval()
        self.transformer: Any = self.pipeline.transformer
        self._reference: Any = None
        if self.lora:
            self._add_adapters(config)
        else:
            if config.train.kl_coef > 0:
                self._reference = deepcopy(self.transformer)
            self.transformer.float().requires_grad_(True)
            for name in self.base.without_effect():
                self.transformer.get_submodule(name).requires_grad_(False)
        if settings.gradient_checkpointing:
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
            text = self._kept(unique) if self._kept_texts else self._encode(unique)
        return text[torch.tensor([unique.index(prompt) for prompt in prompts])]

    def velocity(self, latents: Tensor, timestep: float, text: Text, *, reference: bool = False) -> Tensor:
        """The velocity at latents ``[B, C, h, w]`` after guidance, in the transformer's dtype.

        With classifier-free guidance, the transformer's batch is 2 B: the unconditional half, then the conditional one.

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
        with torch.no_grad(), self._present([vae]):
            return (self.base.decode(latents.to(vae.dtype)).float() / 2 + 0.5).clamp(0, 1).cpu()

    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of one sample.

        Raises:
            ValueError: the model does not support the resolution.
        """
        side, scale = self.base.default_side, self.pipeline.vae_scale_factor
        if self.resolution is not None:
            unit = scale * self.base.patch
            if self.resolution % unit:
                raise ValueError(
                    f"rollout.resolution must be a multiple of {unit} for this model, got {self.resolution}"
                )
            side = self.resolution // scale
        return self.base.channels, side, side

    def schedule(self, steps: int) -> Schedule:
        """The noise levels of the pipeline, whose shift may depend on the resolution."""
        _, rows, columns = self.latent_shape()
        tokens = rows * columns // self.base.patch**2
        return schedule_of(self.pipeline, steps, sigmas=self.base.sigmas(steps), tokens=tokens)

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
            # Readers of the file, which has no alpha, assume a scale of one.
            adapters |= {n: value * self._lora_scale for n, value in adapters.items() if ".lora_B." in n}
            self.pipeline.save_lora_weights(folder, transformer_lora_layers=adapters, safe_serialization=True)
        else:
            from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

            self.model.save_config(folder / "transformer")
            save_file(state, folder / "transformer" / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def _guided(self, model: Any, latents: Tensor, timestep: float, text: Text) -> Tensor:
        if self.base.doubled:
            if self._unconditional is None:
                self._unconditional = self.encode([""])
            text = Text.joined([self._unconditional[torch.zeros(len(latents), dtype=torch.int64)], text])
            latents = torch.cat([latents, latents])
        time = torch.full((len(latents),), timestep, device=latents.device)
        velocity = self.base.predict(model, latents.to(self.pipeline.transformer.dtype), time, text)
        return self.base.combine(*velocity.chunk(2)) if self.base.doubled else velocity

    def _encode(self, prompts: list[str]) -> Text:
        with self._present(self._encoders):
            return self.base.encode(prompts, self.device)

    def _kept(self, prompts: list[str]) -> Text:
        """The embeddings of prompts, each encoded alone, so that they do not depend on what was encoded before."""
        missing = [prompt for prompt in prompts if prompt not in self._texts]
        with self._present(self._encoders if missing else []):
            self._texts |= {prompt: self.base.encode([prompt], self.device).to("cpu") for prompt in missing}
        self._texts |= {prompt: self._texts.pop(prompt) for prompt in prompts}  # the latest are last
        text = Text.joined([self._texts[prompt] for prompt in prompts])
        for prompt in list(self._texts)[: -self._kept_texts]:
            del self._texts[prompt]
        return text.to(self.device)

    @contextmanager
    def _present(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """Moves offloaded models to the device within the context."""
        moved = models if self._offloaded else []
        for model in moved:
            model.to(self.device)
        try:
            yield
        finally:
            for model in moved:
                model.to("cpu")

    def _add_adapters(self, config: Config) -> None:
        from peft import LoraConfig

        torch.manual_seed(config.train.seed)
        self.transformer.add_adapter(
            LoraConfig(
                r=config.model.lora_rank,
                lora_alpha=config.model.lora_alpha,
                init_lora_weights="gaussian",
                target_modules=list(self.base.lora_targets),
                exclude_modules=self.base.without_effect() or None,
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
    """Loads a pipeline; "small" is the StableDiffusion3Pipeline that ships with the package.

    Raises:
        ValueError: the pipeline does not exist.
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
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
