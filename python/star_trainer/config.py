"""The settings of a training run. Every field is an option of ``star-train`` and a key of its YAML files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Model:
    """What is trained.

    Args:
        path: "small", the small Stable Diffusion 3 that ships with the package; a local folder of a
            StableDiffusion3Pipeline; or the id of one on the hub.
        dtype: of the frozen weights.
        lora_rank: rank of the adapters on the attention projections; 0 trains all weights of the transformer.
        lora_alpha: scale of the adapters, over their rank.
        gradient_checkpointing: computes activations twice to keep fewer of them.
        text_length: T5's tokens (max_sequence_length of diffusers' pipeline).
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
    """Prompts.

    Args:
        prompts: a file (.txt, or without a suffix) with a prompt a line; or one (.jsonl, .json) of JSON lines with a
            "prompt" and its metadata each (as GenEval's); or "scenes:composition" or "scenes:text", drawn anew.
        eval_prompts: the same for evaluation; None takes prompts of ``prompts``.
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
        transition: the sampler: Flow-GRPO's, Flow-CPS's or DanceGRPO's.
        noise_level: its noise (eta for "dance_sde").
        steps: denoising steps.
        guidance: scale of classifier-free guidance, in rollout and training; 1 is without.
        resolution: rows and columns of the images; None is the model's own.
        groups: prompts an epoch.
        group_size: samples of each prompt, which are compared with each other.
        batch: samples of a process in one forward pass.
        window: noisy steps, of which there is a random run each epoch, the others being without noise (and not
            trained); None makes all steps noisy and trains all but the last.
        window_end: the window lies within so many first steps; None is all but the last.
        shared_noise: starts the samples of a group from the same noise.
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
    """Where and when the advantage acts; ``method: plain`` is Flow-GRPO.

    Args:
        method: "star" by attention maps of the prompt's core content, "plain" everywhere alike.
        strength: from 0 (as plain) to 1 (in proportion to the map).
        over: mean one over the positions of each "step", or over all of the "trajectory", where a step's share is its
            mass on the content; with "change" it is how much of its map moves until the next step.
        cap: largest weight; None is without.
        blocks: the transformer's blocks whose maps are averaged: "default", "all", or a list of indices.
        source: core content: "auto", "geneval", "quoted" or "words", as star_kernels.prompts.core_content.
        credit: "image", the advantage of the picture acts by the map of all core content; "split", by the same map, and
            at each position each phrase's part of that advantage counts for the phrase's share of the attention there;
            "phrase", each phrase has an advantage of its own instead, its part of the reward compared for itself, which
            acts by its own map.
    """

    method: Literal["star", "plain"] = "star"
    strength: float = 1.0
    over: Literal["step", "trajectory", "change"] = "step"
    cap: float | None = None
    blocks: Literal["default", "all"] | list[int] = "default"
    source: Literal["auto", "geneval", "quoted", "words"] = "auto"
    credit: Literal["image", "split", "phrase"] = "image"


@dataclass
class Reward:
    """What samples are judged by.

    Args:
        weights: rewards by name, import path ("package.module:attribute") or URL, and their weights in the sum.
        options: of a reward by name, its constructor's arguments; a text that begins with "~/" is a path.
        timeout: seconds for one batch.
        on_failure: "stop" the run, or "skip" the sample, when a reward raises, hangs or is not finite.
        std: divides advantages by the standard deviation of the group, or of all samples of the epoch.
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
        epochs: rollouts and updates in all.
        updates: optimiser steps an epoch, each on its share of the samples.
        passes: times the samples of an epoch are gone through.
        steps: noisy steps that are trained, a random choice each epoch; None is all of them.
        batch: samples of a process in one forward pass; None is the rollout's.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 or None is without.
        ratio: "sample", one ratio and one clip a sample, or "location", one at each latent position.
        clip_range: the ratio is clipped to 1 - clip_range .. 1 + clip_range.
        advantage_clip: advantages are clipped to this range.
        ratio_norm: GRPO-Guard's normalisation of the ratio.
        kl_coef: weight of the KL divergence from the model as it was.
        ema: decay of the average of the trained weights, which is evaluated and exported; 0 is without.
        ema_interval: optimiser steps between its updates.
        mixed_precision: of the forward passes.
        seed: of prompts, noise and adapters.
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
    """Samples of the averaged weights, without noise.

    Args:
        every: epochs between evaluations; 0 is never.
        prompts: how many.
        steps: denoising steps.
    """

    every: int = 10
    prompts: int = 64
    steps: int = 40


@dataclass
class Output:
    """What a run leaves behind.

    Args:
        folder: for all of it.
        checkpoint_every: epochs between checkpoints; 0 is the last alone.
        keep: checkpoints kept.
        pictures_every: epochs between sample grids and allocation strips; 0 is never.
        tensorboard: writes TensorBoard's files beside metrics.jsonl.
        resume: goes on from the last checkpoint of the folder, if there is one.
    """

    folder: str = "runs/star"
    checkpoint_every: int = 10
    keep: int = 2
    pictures_every: int = 10
    tensorboard: bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        self.folder = os.path.expanduser(self.folder)


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
        """Of an epoch, over all processes."""
        return self.rollout.groups * self.rollout.group_size


def _expanded(value: Any) -> Any:
    """Paths of the home folder, within lists and mappings too, in full."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~/") else value
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    return value
