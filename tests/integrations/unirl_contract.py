"""A stand-in for the parts of UniRL around an algorithm: stage, segment, part, and ``FlowGRPO``.

Written from its sources (0.2.0); tools/clients/unirl.py runs the package itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from small_pipelines import PROMPTS, SIZE, embeddings, sd3_pipeline
from torch import Tensor

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.0])
SDE_STEPS = [1, 3]


@dataclass
class Segment:
    latents: Tensor  # [B, K, ...], after the steps of indices
    indices: list[int]
    sde_indices: Tensor
    sigmas: Tensor = SIGMAS
    sde_logp: Tensor | None = None
    sde_means: Tensor | None = None
    loss_mask: Tensor | None = None

    def latents_at(self, step: int) -> Tensor:
        return self.latents[:, self.indices.index(step)]


@dataclass
class Part:
    segment: Segment
    conditions: Any
    metadata: list[dict[str, str]]

    @property
    def batch_size(self) -> int:
        return len(self.metadata)

    def slice(self, start: int, end: int) -> Part:
        rows = {n: v[start:end] for n, v in vars(self.segment).items() if n in CONCATENATED and v is not None}
        return Part(replace(self.segment, **rows), self.conditions[start:end], self.metadata[start:end])


CONCATENATED = ("latents", "sde_logp", "sde_means", "loss_mask")


@dataclass(frozen=True)
class ReplayResult:
    log_probs: Tensor
    prev_sample_means: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    loss: float
    metrics: dict[str, Any]


class Stage:
    """A small SD3 with guidance, and the samplers "flow" and "cps"."""

    def __init__(self, sampler: str = "flow") -> None:
        self.transformer = sd3_pipeline().transformer
        self.strategy = SimpleNamespace(canonical_name=sampler)
        self.text = [embeddings(len(PROMPTS), seed) for seed in (1, 2)]

    def trainable_module(self) -> Any:
        return self.transformer

    def std(self, i: int, eta: float) -> Tensor:
        sigma, after = SIGMAS[i], SIGMAS[i + 1]
        if self.strategy.canonical_name == "cps":
            return after * math.sin(eta * math.pi / 2)
        return torch.sqrt(sigma / (1 - sigma)) * eta * torch.sqrt(sigma - after)

    def mean(self, conditions: Sequence[int], x: Tensor, i: int, eta: float) -> Tensor:
        (embeds, pooled), (negative, negative_pooled) = ((e[conditions], p[conditions]) for e, p in self.text)
        both = self.transformer(
            hidden_states=torch.cat([x, x]), timestep=(1000 * SIGMAS[i]).expand(2 * len(x)),
            encoder_hidden_states=torch.cat([negative, embeds]),
            pooled_projections=torch.cat([negative_pooled, pooled]), return_dict=False,
        )[0]  # fmt: skip
        without, given = both.chunk(2)
        v, sigma, after = without + 2 * (given - without), SIGMAS[i], SIGMAS[i + 1]
        if self.strategy.canonical_name == "cps":
            kept = torch.sqrt(after**2 - self.std(i, eta) ** 2)
            return (1 - after) * (x - sigma * v) + kept * (x + (1 - sigma) * v)
        dt = after - sigma
        s = self.std(i, eta) ** 2 / -dt
        return x * (1 + s / (2 * sigma) * dt) + v * (1 + s * (1 - sigma) / (2 * sigma)) * dt

    def replay(self, conditions: Any, *, segment: Any, params: Any, step_indices: Any = None) -> ReplayResult:
        log_probs, means = [], []
        for i in step_indices or segment.sde_indices.tolist():
            mean, std = self.mean(conditions, segment.latents_at(i), i, params.eta), self.std(i, params.eta)
            drawn = segment.latents_at(i + 1)
            density = -((drawn - mean) ** 2)
            if self.strategy.canonical_name == "flow":
                density = density / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
            log_probs.append(density.flatten(1).mean(dim=1))
            means.append(mean)
        return ReplayResult(torch.stack(log_probs, dim=1), torch.stack(means, dim=1))


class FlowGRPO:
    """Flow-GRPO's clipped loss over the steps of a segment; advantages are not clipped."""

    def __init__(self, *, stage: Any, params: Any, clip_range: float = 1e-4, old_logp_source: str = "rollout") -> None:
        self.stage, self.params, self.clip_range = stage, params, clip_range
        self.old_logp_source, self.conditions_cls = old_logp_source, None

    @property
    def recomputes_anchor(self) -> bool:
        return self.old_logp_source == "replay"

    def prepare_segment(self, *, conditions: Any, segment: Any) -> None:
        if self.old_logp_source == "replay":
            with torch.no_grad():
                segment.sde_logp = self.stage.replay(conditions, segment=segment, params=self.params).log_probs

    def prepare_part(self, part: Any) -> Any:
        return part

    def compute_loss_and_backward(
        self, *, conditions: Any, segment: Any, advantages: Tensor, training_progress: float, loss_scale: float
    ) -> StepResult:
        steps = segment.sde_indices.tolist()
        new = self.stage.replay(conditions, segment=segment, params=self.params, step_indices=steps).log_probs
        ratio = torch.exp(new - gather_sde_field(segment.sde_logp, segment.sde_indices, steps))
        a = advantages[:, None]
        clipped = -a * ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        loss = torch.maximum(-a * ratio, clipped).mean()
        (loss * loss_scale).backward()
        value = loss.item()
        return StepResult(value, {"policy_loss": value, "ratio_mean": ratio.mean().item()})


def gather_sde_field(tensor: Tensor, sde_indices: Tensor, target_steps: list[int], *, field_name: str = "") -> Tensor:
    return tensor[:, [sde_indices.tolist().index(step) for step in target_steps]]


def _transition_sigma(stage: Any, *, segment: Any, target_steps: list[int], eta: float, device: Any) -> Tensor:
    return torch.stack([stage.std(step, eta) for step in target_steps])


@pytest.fixture
def unirl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the stand-in for UniRL for one test."""
    modules = {name: ModuleType(name) for name in ("unirl", "unirl.algorithms")}
    contents = {
        "base": {
            "gather_sde_field": gather_sde_field,
            "typed_conditions": lambda conditions, kind: conditions,
            "_transition_sigma": _transition_sigma,
        },
        "flowgrpo": {"FlowGRPO": FlowGRPO},
    }
    for name, values in contents.items():
        modules[f"unirl.algorithms.{name}"] = ModuleType(name)
        vars(modules[f"unirl.algorithms.{name}"]).update(values)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def rollout(stage: Stage, eta: float = 0.6) -> Part:
    """A part of two samples with the latents around the SDE steps."""
    torch.manual_seed(0)
    everyone = list(range(len(PROMPTS)))
    indices = sorted({i + n for i in SDE_STEPS for n in (0, 1)})
    latents = {i: torch.randn(len(PROMPTS), 4, SIZE, SIZE) for i in SDE_STEPS}
    with torch.no_grad():
        for i in SDE_STEPS:
            mean = stage.mean(everyone, latents[i], i, eta)
            latents[i + 1] = mean + stage.std(i, eta) * torch.randn_like(mean)
    segment = Segment(torch.stack([latents[i] for i in indices], dim=1), indices, torch.tensor(SDE_STEPS))
    with torch.no_grad():
        segment.sde_logp = stage.replay(everyone, segment=segment, params=SimpleNamespace(eta=eta)).log_probs
    return Part(segment, everyone, [{"prompt": prompt} for prompt in PROMPTS])
