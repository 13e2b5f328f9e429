"""The settings of a training run. Each field is an option of ``star-train`` and a key of its YAML files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Model:
    """The model to train.

    Args:
        path: "small", the small Stable Diffusion 3 that ships with the package; a local folder with a
            StableDiffusion3Pipeline; or the id of one on the Hugging Face hub.
        dtype: dtype of the frozen weights.
        lora_rank: rank of the LoRA adapters on the attention projections; 0 trains all weights of the transformer.
        lora_alpha: LoRA scale; the adapters are multiplied by lora_alpha / lora_rank.
        gradient_checkpointing: recomputes activations in the backward pass to save memory.
        text_length: number of T5 tokens (max_sequence_length of the diffusers pipeline).
    """

    path: str = "small"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora_rank: int = 0
    lora_alpha: int = 64
    gradient_checkpointing: bool = False
    text_length: int = 256

    def __post_init__(self) -> None:
        self.path = os.path.expanduser(self.path)


@dataclass
class Data:
    """The prompts.

    Args:
        prompts: a text file (.txt, or without a suffix) with one prompt per line; a file of JSON lines (.jsonl, .json),
            each with a "prompt" and its metadata (GenEval's format); or "scenes:composition" or "scenes:text" for
            prompts of random scenes.
        eval_prompts: prompts for evaluation, in the same format; None evaluates on ``prompts``.
    """

    prompts: str = "scenes:composition"
    eval_prompts: str | None = None

    def __post_init__(self) -> None:
        self.prompts = os.path.expanduser(self.prompts)
        self.eval_prompts = self.eval_prompts and os.path.expanduser(self.eval_prompts)


@dataclass
class Rollout:
    """How samples are drawn.

    Args:
        transition: the sampler: Flow-GRPO's "flow_sde", Flow-CPS's "flow_cps" or DanceGRPO's "dance_sde".
        noise_level: noise level of the sampler (eta of "dance_sde").
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance, in rollout and training; 1 disables it.
        resolution: height and width of the images in pixels; None uses the model's default.
        groups: number of prompts per epoch.
        group_size: number of samples per prompt; their rewards are compared with each other.
        batch: number of samples per process and forward pass.
        window: number of consecutive SDE steps, placed at random each epoch; the others are ODE steps and are not
            trained. None makes all steps SDE steps and trains all but the last.
        window_end: the window lies within this number of first steps; None is all steps but the last.
        shared_noise: samples of a group start from the same initial noise.
    """

    transition: Literal["flow_sde", "flow_cps", "dance_sde"] = "flow_sde"
    noise_level: float = 0.7
    steps: int = 10
    guidance: float = 4.5
    resolution: int | None = None
    groups: int = 48
    group_size: int = 24
    batch: int = 8
    window: int | None = None
    window_end: int | None = None
    shared_noise: bool = False


@dataclass
class Allocation:
    """Where and when the advantage acts.

    Args:
        method: "star" weights the advantage by attention maps of the prompt's core content; "plain" is Flow-GRPO, with
            uniform weights.
        strength: from 0 (uniform weights) to 1 (weights in proportion to the map).
        over: "step": weights have a mean of one over the positions of each step. "trajectory": over all positions and
            steps, where the share of a step is its attention mass on the core content. "total_variation": as
            "trajectory", but the share of a step is the total variation between its map and the next step's.
        cap: maximum weight; None is unlimited.
        blocks: transformer blocks whose maps are averaged: "all", a list of indices, or "default", those that published
            measurements found to locate words: block 9 of SD3-Medium and SD3.5-Medium, double-stream blocks 10 to 18
            of FLUX.1, all blocks of other models.
        source: how core content is found: "auto", "geneval", "quoted" or "words" (star_kernels.prompts.core_content).
        credit: "image": one advantage per image, weighted by the map of all core content. "split": the same, but each
            phrase's part of that advantage is weighted by the phrase's share of the attention at each position.
            "phrase": one advantage per phrase, computed from the phrase's part of the reward and weighted by the
            phrase's own map.
    """

    method: Literal["star", "plain"] = "star"
    strength: float = 1.0
    over: Literal["step", "trajectory", "total_variation"] = "step"
    cap: float | None = None
    blocks: Literal["default", "all"] | list[int] = "default"
    source: Literal["auto", "geneval", "quoted", "words"] = "auto"
    credit: Literal["image", "split", "phrase"] = "image"


@dataclass
class Reward:
    """The rewards.

    Args:
        weights: weight of each reward in the sum, by name, import path ("package.module:attribute") or URL.
        options: constructor arguments of each reward, by the same key; strings that begin with "~/" are paths.
        timeout: maximum time for one call of a reward, in seconds.
        on_failure: "stop" the run or "skip" the sample if a reward raises, times out or is not finite.
        std: divide advantages by the standard deviation of the "group" or of all samples of the epoch ("global").
    """

    weights: dict[str, float] = field(default_factory=lambda: {"scene": 1.0})
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    timeout: float = 600.0
    on_failure: Literal["stop", "skip"] = "stop"
    std: Literal["group", "global"] = "group"

    def __post_init__(self) -> None:
        self.options = _expanded(self.options)


@dataclass
class Train:
    """The update.

    Args:
        epochs: number of epochs; each is one rollout and its updates.
        updates: number of optimiser steps per pass over the samples of an epoch.
        passes: number of passes over the samples of an epoch.
        steps: number of SDE steps to train, chosen at random each epoch; None trains all of them.
        batch: number of samples per process and forward pass; None uses rollout.batch.
        learning_rate: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        max_grad_norm: maximum gradient norm; 0 or None disables clipping.
        ratio: "sample": one ratio and one clip per sample; "location": one per latent position.
        clip_range: ratios are clipped to 1 - clip_range .. 1 + clip_range.
        advantage_clip: advantages are clipped to -advantage_clip .. advantage_clip.
        ratio_norm: enables GRPO-Guard's normalisation of the ratio.
        kl_coef: weight of the KL divergence from the initial model.
        ema: decay of the moving average of the trained weights, which is evaluated and exported; 0 disables it.
        ema_interval: optimiser steps between updates of the moving average.
        mixed_precision: precision of the forward passes.
        seed: seed of prompts, noise and adapters.
    """

    epochs: int = 100
    updates: int = 2
    passes: int = 1
    steps: int | None = None
    batch: int | None = None
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    max_grad_norm: float | None = 1.0
    ratio: Literal["sample", "location"] = "sample"
    clip_range: float = 1e-4
    advantage_clip: float = 5.0
    ratio_norm: bool = False
    kl_coef: float = 0.0
    ema: float = 0.9
    ema_interval: int = 8
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0


@dataclass
class Evaluation:
    """Evaluation of the averaged weights, with ODE steps.

    Args:
        every: epochs between evaluations; 0 disables them.
        prompts: number of prompts, one image each.
        steps: number of denoising steps.
    """

    every: int = 10
    prompts: int = 64
    steps: int = 40


@dataclass
class Output:
    """The files of a run.

    Args:
        folder: folder of the run.
        checkpoint_every: epochs between checkpoints; 0 writes one after the last epoch only.
        keep: number of checkpoints to keep.
        images_every: epochs between allocation figures; 0 draws neither these nor the sample grids of evaluations.
        tensorboard: writes TensorBoard files in addition to metrics.jsonl.
        resume: resumes from the latest checkpoint in the folder, if there is one.
    """

    folder: str = "runs/star"
    checkpoint_every: int = 10
    keep: int = 2
    images_every: int = 10
    tensorboard: bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        self.folder = os.path.expanduser(self.folder)

    def draws(self, epoch: int) -> bool:
        """Whether allocation figures are drawn after this epoch."""
        return bool(self.images_every) and (epoch == 1 or epoch % self.images_every == 0)


@dataclass
class Config:
    """A run of star-train."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    rollout: Rollout = field(default_factory=Rollout)
    allocation: Allocation = field(default_factory=Allocation)
    reward: Reward = field(default_factory=Reward)
    train: Train = field(default_factory=Train)
    evaluation: Evaluation = field(default_factory=Evaluation)
    output: Output = field(default_factory=Output)

    @property
    def samples(self) -> int:
        """Number of samples per epoch, over all processes."""
        return self.rollout.groups * self.rollout.group_size


def _expanded(value: Any) -> Any:
    """The value with "~/" expanded in all strings, also within lists and mappings."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~/") else value
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    return value
