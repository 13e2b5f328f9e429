"""VeRL-Omni's own engine, adapters, scheduler and losses on a CPU, around a model of a few numbers.

Import it after :func:`tools.clients.loading.prepare`. The modules of VeRL-Omni are imported by name in functions, so
that this file can be read, linted and typed without them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BATCH = 4
CLIP = 1e-4
NOISE = {"sde": 0.7, "cps": 0.8, "dance_sde": 0.3}

# Packages that VeRL and VeRL-Omni import and that the checked modules do not use.
OPTIONAL = (
    *("ray", "vllm", "vllm_omni", "torchdata", "datasets", "cachetools", "transfer_queue", "uvicorn", "fastapi"),
    *("pandas", "wandb", "aiohttp", "starlette", "openai", "pylatexenc", "Levenshtein", "liger_kernel", "numba"),
    *("dill", "blobfile", "librosa", "soundfile", "verl.utils.chat_template"),
)
WHOLE = ("verl_omni.trainer.config", "verl_omni.workers.config", "verl_omni.pipelines.schedulers")


@dataclass(frozen=True)
class Adapter:
    """A training adapter of VeRL-Omni, with a latent of its layout."""

    folder: str
    architecture: str
    algorithm: str
    shape: tuple[int, ...]  # of a sample's latent
    loss_mode: str = "flow_grpo"
    steps: tuple[int, ...] = (1, 2, 3)
    explicit: bool = False  # whether the batch has all_next_latents
    fields: Callable[[], dict[str, Any]] = field(default=dict)


def _texts(*names: str) -> dict[str, Any]:
    return {name: torch.randn(BATCH, 5, 8) for name in names}


def _sd3() -> dict[str, Any]:
    names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: torch.randn(BATCH, 8) for name in names}


def _ltx2() -> dict[str, Any]:
    length = torch.full((BATCH, 1), 16)
    return {"video_seq_len": length, **_texts("audio_prompt_embeds", "negative_audio_prompt_embeds")}


ADAPTERS = (
    Adapter("sd3_flow_grpo", "StableDiffusion3Pipeline", "flow_grpo", (16, 8, 8), fields=_sd3),
    Adapter("qwen_image_flow_grpo", "QwenImagePipeline", "flow_grpo", (16, 64)),
    Adapter("qwen_image_mix_grpo", "QwenImagePipeline", "mix_grpo", (16, 64)),
    Adapter(
        *("qwen_image_edit_flow_grpo", "QwenImageEditPlusPipeline", "flow_grpo", (16, 64)),
        fields=lambda: {"condition_image_latents": torch.randn(BATCH, 9, 64)},
    ),
    Adapter("wan22_dance_grpo", "WanPipeline", "dance_grpo", (16, 2, 4, 6), loss_mode="dance_grpo"),
    Adapter(*("ltx2_flow_grpo", "LTX2Pipeline", "flow_grpo", (24, 16)), steps=(1, 4, 6), explicit=True, fields=_ltx2),
    Adapter(
        *("bagel_flow_grpo", "OmniBagelForConditionalGeneration", "flow_grpo", (16, 64)),
        fields=lambda: {"prompt_token_ids": torch.arange(BATCH * 3).view(BATCH, 3)},
    ),
)


class Model(nn.Module):
    """A velocity that depends on latent and text, plus a trained number for each element of the latent."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(shape))
        options = {"latent_patch_size": 1, "vae_downsample": 16, "max_latent_size": 64}
        self.config = SimpleNamespace(guidance_embeds=False, **options)

    def forward(self, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        text = inputs.get("encoder_hidden_states")
        offset = 0.1 if text is None else text.float().mean(dim=(1, 2)).view(-1, *[1] * (hidden_states.ndim - 1))
        audio = inputs.get("audio_hidden_states")
        latent = hidden_states if audio is None else torch.cat([hidden_states, audio], dim=1)
        velocity = 0.3 * latent + offset
        if latent.shape[1:] == self.change.shape:
            velocity = velocity + self.change
        else:  # reference images follow the image
            n = len(self.change)
            velocity = torch.cat([velocity[:, :n] + self.change, velocity[:, n:]], dim=1)
        return (velocity,) if audio is None else velocity.split([hidden_states.shape[1], audio.shape[1]], dim=1)


class Outcome(NamedTuple):
    """The sum over the steps of an update."""

    loss: Tensor
    gradient: Tensor
    metrics: dict[str, float]  # of the last step


class World:
    """One micro-batch of an adapter and a sampler, from a rollout of the unchanged model."""

    def __init__(self, adapter: Adapter, sde_type: str, *, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.adapter, self.sde_type = adapter, sde_type
        importlib.import_module(f"verl_omni.pipelines.{adapter.folder}.diffusers_training_adapter")
        self.config = model_config(adapter, sde_type)
        self.model = Model(adapter.shape)
        self.engine = make_engine("PPODiffusersFSDPEngine", self.model, self.config)
        self.engine.scheduler = _scheduler(self.config)
        self.batch = self.rollout()

    def rollout(self) -> Any:
        """A micro-batch as the trainer makes it: a trajectory, and the old model's log-probabilities and means."""
        steps = len(self.adapter.steps)
        latents = torch.randn(BATCH, steps if self.adapter.explicit else steps + 1, *self.adapter.shape)
        names = ("prompt_embeds", "negative_prompt_embeds")
        masks = {f"{name}_mask": torch.ones(BATCH, 5, dtype=torch.int64) for name in names}
        fields = {
            "all_latents": latents,
            "all_timesteps": self.engine.scheduler.timesteps[list(self.adapter.steps)].repeat(BATCH, 1),
            "advantages": torch.tensor([1.5, -0.7, -9.0, -0.2])[:, None].repeat(1, steps),
            **_texts(*names),
            **masks,
            **self.adapter.fields(),
        }
        if self.adapter.explicit:
            fields["all_next_latents"] = torch.zeros(BATCH, steps, *self.adapter.shape)
        batch = make_batch(fields)
        for step in range(steps):
            output = self.outputs(batch, step)
            s, root = output["std_dev_t"], output["sqrt_dt"].view(-1, *[1] * len(self.adapter.shape))
            std = s * root if self.sde_type == "sde" else s
            drawn = output["prev_sample_mean"] + std * torch.randn(BATCH, *self.adapter.shape)
            (batch["all_next_latents"][:, step] if self.adapter.explicit else batch["all_latents"][:, step + 1]).copy_(
                drawn
            )
        old = [self.outputs(batch, step) for step in range(steps)]
        batch["old_log_probs"] = torch.stack([output["log_probs"] for output in old], dim=1).float()
        batch["old_prev_sample_mean"] = torch.stack([output["prev_sample_mean"] for output in old], dim=1).float()
        batch["rollout_log_probs"] = batch["old_log_probs"].clone()
        return batch

    def outputs(self, batch: Any, step: int) -> dict[str, Tensor]:
        with torch.no_grad():
            _, output = self.engine.forward_step(batch, None, True, step)
        found: dict[str, Tensor] = output["model_output"]
        return found

    def update(self, loss_mode: str | None = None, change: float = 0.05, **extra: Tensor) -> Outcome:
        """Loss and gradient of all steps, after the model has changed, with further tensors in the batch."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            self.model.change.copy_(change * torch.randn(self.adapter.shape, generator=generator))
        batch = self.batch.clone(recurse=False)
        batch.update(extra)
        function = loss_function(loss_mode or self.adapter.loss_mode)
        self.model.zero_grad()
        total, metrics = torch.zeros(()), {}
        for step in range(len(self.adapter.steps)):
            loss, output = self.engine.forward_step(batch, function, False, step)
            loss.backward()
            total, metrics = total + loss.detach(), output["metrics"]
        assert self.model.change.grad is not None
        gradient = self.model.change.grad.clone()
        return Outcome(total, gradient, {name: float(value.aggregate()) for name, value in metrics.items()})


def nft_batch(shape: tuple[int, ...]) -> Any:
    """A micro-batch of DiffusionNFT."""
    torch.manual_seed(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    masks = {f"{name}_mask": torch.ones(BATCH, 5, dtype=torch.int64) for name in names}
    return make_batch(
        {
            "latents_clean": torch.randn(BATCH, *shape),
            "forward_noise": torch.randn(BATCH, 2, *shape),
            "train_timesteps": torch.tensor([[900, 300], [500, 200], [50, 700], [990, 20]]),
            "reward_prob": torch.tensor([[0.9], [0.1], [0.5], [0.0]]).repeat(1, 2),
            **_texts(*names),
            **masks,
        }
    )


def make_batch(fields: dict[str, Any]) -> Any:
    tu = importlib.import_module("verl.utils.tensordict_utils")
    batch = tu.get_tensordict(fields)
    sizes = {"height": 64, "width": 64, "vae_scale_factor": 8}
    tu.assign_non_tensor(batch, gradient_accumulation_steps=3, sp_size=1, **sizes)
    return batch


def model_config(adapter: Adapter, sde_type: str) -> SimpleNamespace:
    settings = importlib.import_module("verl_omni.workers.config.diffusion.rollout")
    pipeline = settings.DiffusionPipelineConfig(
        height=64, width=64, num_frames=9, guidance_scale=2.0, true_cfg_scale=2.0
    )
    return SimpleNamespace(
        architecture=adapter.architecture,
        algorithm=adapter.algorithm,
        external_lib=None,
        attn_backend="native",
        pipeline=pipeline,
        algo=settings.DiffusionRolloutAlgoConfig(noise_level=NOISE[sde_type], sde_type=sde_type),
    )


def make_engine(name: str, module: nn.Module, config: Any) -> Any:
    """An engine without processes: its __init__ builds FSDP and device meshes."""
    engines = importlib.import_module("verl_omni.workers.engine.fsdp.diffusers_impl")
    engines.device_name = "cpu"  # VeRL falls back to CUDA where there is no accelerator
    made = type(name, (getattr(engines, name),), {"get_data_parallel_group": lambda self: None})
    made.__abstractmethods__ = frozenset()
    engine = object.__new__(made)
    engine.module, engine.model_config = module, config
    engine.ulysses_sequence_parallel_size, engine.use_ulysses_sp = 1, False
    return engine


def loss_function(loss_mode: str) -> Callable[..., Any]:
    """VeRL-Omni's own dispatch to the registered loss."""
    losses = importlib.import_module("verl_omni.workers.utils.losses")
    return partial(losses.diffusion_loss, config=actor_config(loss_mode))


def actor_config(loss_mode: str) -> Any:
    settings = importlib.import_module("verl_omni.workers.config.diffusion.actor")
    diffusion_loss = settings.DiffusionLossConfig(loss_mode=loss_mode, clip_ratio=CLIP, ref_kl_coef=0.1)
    return settings.FSDPDiffusionActorConfig(
        rollout_n=BATCH, ppo_micro_batch_size_per_gpu=BATCH, diffusion_loss=diffusion_loss
    )


def _scheduler(config: Any) -> Any:
    schedulers = importlib.import_module("verl_omni.pipelines.schedulers.flow_match_sde")
    scheduler = schedulers.FlowMatchSDEDiscreteScheduler(shift=3.0)
    adapters = importlib.import_module("verl_omni.pipelines.model_base")
    adapters.DiffusionModelBase.get_class(config).set_timesteps(scheduler, config, "cpu")
    return scheduler
