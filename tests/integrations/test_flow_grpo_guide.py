"""The diffs and the example in docs/flow-grpo.md work as described, on small pipelines."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from flow_grpo_formulas import close, written_loss, written_step
from small_pipelines import PROMPTS, SIZE, embeddings, flux_pipeline, sd3_pipeline

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flow-grpo.md"
STEPS, BATCH = 5, len(PROMPTS)
ADVANTAGES = torch.tensor([1.3, -0.8])


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


class SD3:
    """The variables of scripts/train_sd3.py."""

    def __init__(self) -> None:
        self.pipeline = sd3_pipeline()
        positive, negative = embeddings(BATCH, 1), embeddings(BATCH, 2)
        self.embeds, self.pooled_embeds = (torch.cat([n, p]) for n, p in zip(negative, positive, strict=True))
        self.latents = torch.randn(BATCH, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
        self.schedule: dict[str, Any] = {"num_inference_steps": STEPS}
        self.rollout_returns = ("images", "latents", "log_probs")
        self.arguments = ("embeds", "pooled_embeds", "config")

    def velocity(self, transformer: Any, latents: Tensor, timestep: Tensor, config: Any) -> Tensor:
        both = transformer(
            hidden_states=torch.cat([latents] * 2), timestep=torch.cat([timestep] * 2),
            encoder_hidden_states=self.embeds, pooled_projections=self.pooled_embeds, return_dict=False,
        )[0]  # fmt: skip
        negative, positive = both.chunk(2)
        return negative + config.sample.guidance_scale * (positive - negative)


class Flux:
    """The variables of scripts/train_flux.py."""

    def __init__(self) -> None:
        self.pipeline = flux_pipeline()
        self.embeds, self.pooled_embeds = embeddings(BATCH, 1)
        self.latents = torch.randn(BATCH, 64, 16, generator=torch.Generator().manual_seed(3))
        self.ids = torch.zeros(64, 3)
        self.ids[:, 1], self.ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
        self.schedule = {"sigmas": [1 - i / STEPS for i in range(STEPS)], "mu": 0.6}
        self.rollout_returns = ("images", "latents", "image_ids", "text_ids", "log_probs")
        self.arguments = ("config",)

    def velocity(self, transformer: Any, latents: Tensor, timestep: Tensor, config: Any) -> Tensor:
        return transformer(
            hidden_states=latents, timestep=timestep / 1000, encoder_hidden_states=self.embeds,
            pooled_projections=self.pooled_embeds, txt_ids=torch.zeros(self.embeds.shape[1], 3), img_ids=self.ids,
            return_dict=False,
        )[0]  # fmt: skip


SCRIPTS = {"sd3": SD3, "flux": Flux}


class Script:
    """A training script of Flow-GRPO with the lines of the guide, for one rollout and one update."""

    def __init__(self, name: str, beta: float = 0.2, *, star: bool = True) -> None:
        lines = re.findall(r"^\+(?!\+)(.*)$", blocks("diff")[list(SCRIPTS).index(name)], re.MULTILINE)
        self.lines = [line.strip() for line in lines]
        self.star = star
        self.model = SCRIPTS[name]()
        self.scope: dict[str, Any] = {
            "torch": torch,
            "pipeline": self.model.pipeline,
            "transformer": self.model.pipeline.transformer,
            "prompts": PROMPTS,
            "accelerator": SimpleNamespace(device=torch.device("cpu")),
            "info": defaultdict(list),
            "config": SimpleNamespace(
                resolution=8 * SIZE,
                sample=SimpleNamespace(noise_level=0.7, guidance_scale=2.0),
                train=SimpleNamespace(clip_range=1e-4, adv_clip_max=5, beta=beta),
            ),
            "embeds": None,
            "pooled_embeds": None,
            "timesteps": None,  # of the rollout
        }
        for line in self.lines:
            if line.startswith("from "):
                exec(line, self.scope)
        # The file of the pipeline imports the step under its original name.
        assert self.lines[-1].endswith(" as sde_step_with_logprob")
        self.step = self.scope.pop("sde_step_with_logprob")

    def line(self, pattern: str) -> str:
        (found,) = [line for line in self.lines if re.search(pattern, line)]
        return found

    def pipeline_with_logprob(self) -> tuple[Any, ...]:
        """The denoising loop of Flow-GRPO's pipelines: one timestep for all samples in SD3, one for each in FLUX."""
        scheduler, latents = self.model.pipeline.scheduler, self.model.latents
        scheduler.set_timesteps(**self.model.schedule)
        generator = torch.Generator().manual_seed(4)
        all_latents, all_log_probs = [latents], []
        for t in scheduler.timesteps:
            velocity = self.model.velocity(
                self.model.pipeline.transformer, latents, t.expand(BATCH), self.scope["config"]
            )
            timestep = t.unsqueeze(0) if isinstance(self.model, SD3) else t.unsqueeze(0).repeat(BATCH)
            latents, log_prob, _, _ = self.step(
                scheduler, velocity.float(), timestep, latents.float(), noise_level=0.7, generator=generator
            )
            all_latents.append(latents)
            all_log_probs.append(log_prob)
        found = {"latents": all_latents, "log_probs": all_log_probs}
        return tuple(found.get(name) for name in self.model.rollout_returns)

    def rollout(self) -> dict[str, Tensor]:
        scope = self.scope
        scope["pipeline_with_logprob"] = self.pipeline_with_logprob
        returned = ", ".join(self.model.rollout_returns)
        opening = self.line(r"^with torch.no_grad\(\)") if self.star else "with torch.no_grad():"
        if self.star:
            exec(self.line(r"select_tokens\("), scope)
        exec(f"{opening}\n    {returned} = pipeline_with_logprob()", scope)
        latents = torch.stack(scope["latents"], dim=1)
        scope["timesteps"] = self.model.pipeline.scheduler.timesteps.repeat(BATCH, 1)
        samples = {
            "timesteps": scope["timesteps"],
            "latents": latents[:, :-1],
            "next_latents": latents[:, 1:],
            "log_probs": torch.stack(scope["log_probs"], dim=1),
            "advantages": ADVANTAGES.double().unsqueeze(1).repeat(1, STEPS),
        }
        if self.star:
            samples |= eval("{" + self.line('"weights"').split("#")[0] + "}", scope)
        perm = torch.tensor([1, 0])  # the scripts shuffle the samples and split them into batches
        samples = {k: v[perm].reshape(-1, BATCH, *v.shape[1:])[0] for k, v in samples.items()}
        self.reorder(perm)
        return samples

    def reorder(self, perm: Tensor) -> None:
        def reordered(t: Tensor) -> Tensor:
            return torch.cat([half[perm] for half in t.split(BATCH)])

        self.model.embeds, self.model.pooled_embeds = map(reordered, (self.model.embeds, self.model.pooled_embeds))

    def loss(self, sample: dict[str, Tensor], j: int, drift: float = 0.0) -> Tensor:
        """The lines of the loss; the reference model has the weights before the drift."""
        scope = self.scope | {"sample": sample, "j": j}
        name = re.match(r"return (\w+)", self.line("^return ")).group(1)

        def compute_log_prob(transformer: Any, pipeline: Any, sample: dict, j: int, *rest: Any) -> Any:
            local = {
                name: self.model.velocity(transformer, sample["latents"][:, j], sample["timesteps"][:, j], rest[-1])
            }
            exec(f"def returned({name}):\n    {self.line('^return ')}", local)
            return local["returned"](local[name])

        scope["compute_log_prob"] = compute_log_prob
        with torch.no_grad():
            exec(self.line(rf"^{name}_ref = "), scope)
            for parameter in self.model.pipeline.transformer.parameters():
                parameter += drift * parameter.abs().mean()
        exec(self.line(rf"^{name} = "), scope)
        exec(self.line("^loss = step_loss"), scope)
        self.velocities = scope[name], scope[f"{name}_ref"]
        return scope["loss"]


@pytest.mark.parametrize("block", blocks("diff"), ids=["sd3", "flux", "qwen"])
def test_at_most_ten_lines_change(block: str) -> None:
    lines = re.findall(r"^\+(?!\+)(.*)$", block, re.MULTILINE)
    assert len(lines) <= 10
    assert sum(line.endswith("# *") for line in lines) == 4


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("name", SCRIPTS)
def test_without_the_starred_lines_the_losses_are_flow_grpos(name: str, beta: float) -> None:
    script = Script(name, beta, star=False)
    sample = script.rollout()
    assert "weights" not in sample
    scheduler = script.model.pipeline.scheduler
    for j in (0, 2):
        loss = script.loss(sample, j, drift=0.02)
        step = {
            "timestep": sample["timesteps"][:, j],
            "x": sample["latents"][:, j],
            "prev": sample["next_latents"][:, j],
        }
        transformer, config = script.model.pipeline.transformer, script.scope["config"]
        velocity = script.model.velocity(transformer, step["x"], step["timestep"], config)
        new, reference = (written_step(scheduler, v, **step) for v in (velocity, script.velocities[1]))
        old = sample["log_probs"][:, j].flatten(1).mean(dim=1)
        expected = written_loss(new, old, sample["advantages"][:, j], beta=beta, reference=reference if beta else None)
        close(loss, expected)
        parameters = list(script.model.pipeline.transformer.parameters())
        gradients = (
            torch.autograd.grad(result, parameters, retain_graph=True, allow_unused=True) for result in (loss, expected)
        )
        ours, theirs = (torch.cat([g.flatten() for g in found if g is not None]) for found in gradients)
        close(ours, theirs, 1e-5)  # the backward pass of the model rounds, too
    assert ("kl_loss" in script.scope["info"]) == (beta > 0)
    assert len(script.scope["info"]["loss"]) == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_with_the_starred_lines_the_loss_has_weights_from_the_maps(name: str) -> None:
    script = Script(name)
    sample = script.rollout()
    weights = sample["weights"]
    assert weights.shape == (BATCH, STEPS, 8, 8)
    torch.testing.assert_close(weights.mean(dim=(2, 3)), torch.ones(BATCH, STEPS))
    assert float(weights.std()) > 0.05
    assert not torch.equal(weights[:, 0], weights[:, 2])
    starred = float(script.loss(sample, 2, drift=0.02).detach())
    del sample["weights"]
    assert float(script.loss(sample, 2).detach()) != starred


def test_the_gradient_of_the_first_update_is_that_of_the_weighted_advantage() -> None:
    """At a ratio of one the gradient of the starred lines is that of -A mean_p W_p log p."""
    script = Script("sd3", beta=0.0)
    sample = script.rollout()
    loss = script.loss(sample, 1)
    parameter = script.model.pipeline.transformer.proj_out.weight
    (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
    step = {"timestep": sample["timesteps"][:, 1], "x": sample["latents"][:, 1], "prev": sample["next_latents"][:, 1]}
    dense = written_step(script.model.pipeline.scheduler, script.velocities[0], **step).log_prob.mean(dim=1)
    weights = sample["weights"][:, 1].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    objective = -(sample["advantages"][:, 1] * (weights * dense).flatten(1).mean(dim=1)).mean()
    (expected,) = torch.autograd.grad(objective, parameter)
    close(gradient, expected, 1e-5)


def test_the_example_trains() -> None:
    (example,) = blocks("python")
    pipeline = sd3_pipeline()
    (prompt_embeds, pooled), (negative_embeds, negative_pooled) = embeddings(BATCH, 1), embeddings(BATCH, 2)
    names: dict[str, Any] = {
        "pipeline": pipeline,
        "prompts": PROMPTS,
        "prompt_embeds": prompt_embeds,
        "negative_embeds": negative_embeds,
        "pooled": pooled,
        "negative_pooled": negative_pooled,
        "latents": torch.randn(BATCH, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(3)),
        "advantages": ADVANTAGES,
    }
    exec(compile(example, str(PAGE), "exec"), names)
    assert names["weights"].shape == (BATCH, 8, 8)
    assert float(names["weights"].std()) > 0.05
    close(names["metrics"]["ratio_mean"], torch.tensor(1.0))
    gradients = [p.grad for p in pipeline.transformer.parameters() if p.grad is not None]
    assert any(bool(g.any()) for g in gradients)
    assert all(bool(g.isfinite().all()) for g in gradients)
