"""UniRL's FlowGRPO and FlowDPPO beside ours, through its own stage, samplers and anchors, on a small SD3.

``folder`` contains the package ``unirl``, 0.2.0 or later: a checkout, or the site-packages of an environment in which
it is installed (Python 3.12). The environment must be able to import it.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tools.clients.interface import Finding, compare
from tools.clients.small_models import SIZE, sd3_model

TOLERANCE = 1e-5
STEPS = 5
INTERFACE = {
    "unirl/algorithms/base.py": {
        "StageAlgorithm.prepare_segment": ["self", "*", "conditions", "segment"],
        "StageAlgorithm.prepare_part": ["self", "part"],
        "StageAlgorithm.compute_loss_and_backward": [
            *("self", "*", "conditions", "segment", "advantages", "training_progress", "loss_scale"),
        ],
        "gather_sde_field": ["tensor", "sde_indices", "target_steps", "*", "field_name="],
        "typed_conditions": ["conditions", "conditions_cls"],
        "_transition_sigma": ["stage", "*", "segment", "target_steps", "eta", "device", "add_coefficient="],
    },
    "unirl/models/types/diffusion.py": {
        "DiffusionStage.replay": ["self", "conditions", "*", "segment", "params", "step_indices="],
    },
    "unirl/train/stack/anchor.py": {"prepare_segment_anchors": ["algorithm", "part", "plan", "*", "order"]},
    "unirl/types/segments/latent.py": {"LatentSegment.latents_at": ["self", "step_idx"]},
}


def check(folder: Path) -> Iterator[Finding]:
    """Two updates of each algorithm and sampler: without weights, with uniform ones, and with a wrong sampler."""
    yield from compare(folder, INTERFACE)
    sys.path.insert(0, str(folder))
    from unirl.algorithms.flowdppo import FlowDPPO
    from unirl.algorithms.flowgrpo import FlowGRPO
    from unirl.sde.kernels import CPSSDEStrategy, DanceSDEStrategy, FlowSDEStrategy

    from star_kernels.integrations import unirl as ours

    for theirs, star in ((FlowGRPO, ours.StarFlowGRPO), (FlowDPPO, ours.StarFlowDPPO)):
        for strategy in (FlowSDEStrategy, DanceSDEStrategy, CPSSDEStrategy):
            name = f"{theirs.__name__}, {strategy.canonical_name}"
            own = World(strategy).updates(theirs)
            off = World(strategy).updates(star)
            same = [torch.equal(a, b) for a, b in zip(off["gradients"], own["gradients"], strict=True)]
            shared = [off["metrics"][i][key] == value for i, m in enumerate(own["metrics"]) for key, value in m.items()]
            yield Finding(f"{name}: without weights, loss, metrics and gradients are equal", all(same) and all(shared))
            even = World(strategy).updates(star, select=_every, strength=0.0)
            yield _near(f"{name}: uniform weights, gradients of two updates", even["gradients"], own["gradients"])
            on = World(strategy).updates(star, select=_some)
            ratio = on["metrics"][0]["ratio_mean"]
            yield Finding(f"{name}: with weights, the first ratio is 1", abs(ratio - 1) < 1e-6, f"{ratio - 1:.1e} off")
            difference = _distance(on["gradients"], own["gradients"])
            yield Finding(f"{name}: with weights, another gradient", difference > 0.01, f"{difference:.2f}")
            yield Finding(
                f"{name}: rollout and training agree in the first update",
                on["metrics"][0]["rollout_log_prob_diff/step_1/max"] < 1e-5,
                f"{on['metrics'][0]['rollout_log_prob_diff/step_1/max']:.1e}",
            )
    yield from _nft()
    world = World(FlowSDEStrategy)
    world.stage.strategy.canonical_name = "cps"
    try:
        world.updates(ours.StarFlowGRPO, select=_some)
        yield Finding("another sampler is an error in the first update", False)
    except ValueError as error:
        yield Finding("another sampler is an error in the first update", "sde_type must be the sampler" in str(error))


def _nft() -> Iterator[Finding]:
    """UniRL's DiffusionNFT at a noise level, beside the call of weighted_nft_loss in docs/unirl.md."""
    from unirl.algorithms.diffusionnft import DiffusionNFT, DiffusionNFTConfig

    from star_kernels import weighted_nft_loss

    x0, old, start = (torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    advantages, t = torch.tensor([1.5, -9.0, 0.3]), torch.tensor(0.6)
    for adaptive in (True, False):
        predictions = [start.clone().requires_grad_() for _ in range(2)]
        made = object.__new__(DiffusionNFT)
        made.config = DiffusionNFTConfig(beta=0.7, use_adaptive_weight=adaptive)
        made.params, made._ref_model = None, None
        made.nft_lora_policy = SimpleNamespace(use_shadow=torch.no_grad)
        given = iter([predictions[0], old])
        made.stage = SimpleNamespace(predict_noise_at_step=lambda *_, given=given, **__: next(given))
        torch.manual_seed(7)
        r = (advantages.clamp(-5, 5) / 5 + 1) / 2
        theirs, _ = made._compute_loss_at_t(
            conditions=None, x0=x0, t_scalar=t, r=r, adv=advantages, B=3, compute_dtype=torch.float32
        )
        torch.manual_seed(7)
        noise, level = torch.randn_like(x0), t.expand(3)
        ours, _ = weighted_nft_loss(
            predictions[1], old, noise - x0, advantages, level, beta=0.7, adaptive=adaptive, advantage_clip=5.0,
            step_weights=None if adaptive else level**2,
        )  # fmt: skip
        for loss in (theirs, ours):
            loss.backward()
        name = f"DiffusionNFT, adaptive={adaptive}"
        yield _near(f"{name}: loss", [ours], [theirs])
        yield _near(f"{name}: gradient", [predictions[1].grad], [predictions[0].grad])


def _near(name: str, found: list[Tensor], expected: list[Tensor]) -> Finding:
    distance = _distance(found, expected)
    return Finding(name, distance <= TOLERANCE, f"{distance:.1e}")


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    a, b = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm()) if a.shape == b.shape else math.inf


def _every(part: Any) -> Any:
    from star_kernels import TokenSelection

    return TokenSelection.from_positions([[0, 1, 2, 3]] * part.batch_size)


def _some(part: Any) -> Any:
    from star_kernels import TokenSelection
    from star_kernels.integrations.unirl import prompts_of

    return TokenSelection.from_positions([[len(prompt) % 7, 20] for prompt in prompts_of(part)])


class World:
    """A small SD3 as UniRL's stage, a rollout, and two optimiser steps on it as in its train stack."""

    def __init__(self, strategy: type[Any]) -> None:
        from unirl.models.sd3.conditions import SD3Conditions
        from unirl.models.sd3.diffusion import SD3DiffusionStage, SD3DiffusionStep
        from unirl.types.conditions import TextEmbedCondition

        self.model = sd3_model()
        self.transformer = self.model.pipeline.transformer
        self.stage = SD3DiffusionStage(
            model=SimpleNamespace(transformer=self.transformer, device="cpu"),
            step=SD3DiffusionStep(),
            strategy=strategy(),
            autocast_precision="fp32",
            trajectory_precision="fp32",
            latent_channels=4,
        )
        embeds, pooled = self.model.embeddings(1)
        negative, negative_pooled = self.model.embeddings(2)
        self.conditions = {
            "text": TextEmbedCondition(embeds=embeds, pooled=pooled),
            "negative_text": TextEmbedCondition(embeds=negative, pooled=negative_pooled),
        }
        self.conditions_cls = SD3Conditions
        self.params = SimpleNamespace(
            num_inference_steps=STEPS, height=8 * SIZE, width=8 * SIZE, guidance_scale=2.0, eta=0.5, seed=0,
            sde_indices=[1, 3], init_same_noise=False, samples_per_prompt=1, noise_group_ids=None,
        )  # fmt: skip

    def updates(self, algorithm: type[Any], **options: Any) -> dict[str, Any]:
        """Gradients and metrics of two updates on one rollout."""
        from unirl.train.stack.anchor import prepare_segment_anchors
        from unirl.types.sample import Part

        torch.manual_seed(0)
        schedule = torch.linspace(1, 0, STEPS + 1)
        typed = self.conditions_cls.from_dict(self.conditions)
        initial = torch.randn(len(self.model.prompts), 4, SIZE, SIZE)
        segment = self.stage.diffuse(typed, schedule=schedule, params=self.params, initial_latents=initial)
        count = len(self.model.prompts)
        part = Part(
            sample_ids=[str(i) for i in range(count)],
            segment=segment,
            conditions=self.conditions,
            metadata=[{"prompt": prompt} for prompt in self.model.prompts],
        )
        made = algorithm(
            params=self.params, stage=self.stage, old_logp_source="replay", conditions_cls=self.conditions_cls,
            **({"clip_range": 2e-3} if "GRPO" in algorithm.__name__ else {"kl_mask_threshold": 1e-4}), **options,
        )  # fmt: skip
        plan = [[(i, i + 1) for i in range(count)]] * 2
        prepare_segment_anchors(made, part, [[r] for r in plan[0]], order=None)
        part = made.prepare_part(part)
        advantages = torch.tensor([1.3, -0.8, -0.5, 0.7])[:count]
        start = copy.deepcopy(self.transformer.state_dict())
        found: dict[str, Any] = {"gradients": [], "metrics": []}
        for micros in plan:
            for begin, end in micros:
                rows = part.slice(begin, end)
                result = made.compute_loss_and_backward(
                    conditions=rows.conditions, segment=rows.segment, advantages=advantages[begin:end],
                    training_progress=0.0, loss_scale=1 / count,
                )  # fmt: skip
                found["metrics"].append(dict(result.metrics))
            for parameter in self.transformer.parameters():
                if parameter.grad is not None:
                    found["gradients"].append(parameter.grad.clone())
                    parameter.data -= 1e-3 * parameter.norm() / parameter.grad.norm().clamp(min=1e-12) * parameter.grad
                    parameter.grad = None
        self.transformer.load_state_dict(start)
        return found
