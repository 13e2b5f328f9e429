"""One rollout-and-update step of plain Flow-GRPO on a diffusers transformer, and the same step with STAR."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks.parts.request import Request
from benchmarks.timing.clocks import CpuClock
from benchmarks.timing.harness import Variant, interleave
from benchmarks.timing.progress import Progress
from benchmarks.variants.policy import ADVANTAGE_CLIP, CLIP_RANGE, NOISE_LEVEL, flow_grpo_loss, flow_grpo_step
from benchmarks.variants.prompt_tokens import encode
from benchmarks.variants.sd3_model import CHANNELS, Size, TextEmbeddings, build, size_for
from star_kernels import TokenSelection, allocate, flow_sde, sample_transition, weighted_policy_loss
from star_kernels.capture import capture_maps
from star_kernels.prompts import TextRegion, core_content, select_tokens

GUIDANCE = 4.5
SHIFT = 3.0
LEARNING_RATE = 1e-5  # small, because all arms update the same weights in turn


@dataclass(frozen=True)
class Arm:
    """The settings in which the compared steps differ."""

    name: str
    label: str
    star: bool = False
    eager: bool = False
    strength: float = 1.0


PLAIN = Arm("plain", "plain Flow-GRPO, our loss and sampler")
STAR = Arm("star", "STAR: the same with maps and weights", star=True)
EAGER = Arm("eager", "plain Flow-GRPO, eager arithmetic", eager=True)


@dataclass(frozen=True)
class Transition:
    """One denoising step of a rollout, as the update needs it."""

    step: int
    sample: Tensor
    prev_sample: Tensor
    log_prob: Tensor
    weights: Tensor | None


class Trainer:
    """The model, the optimiser and the schedule of the compared steps.

    The result of ``step(arm, number)`` depends only on the weights, the prompts and the number.
    """

    def __init__(
        self,
        size: Size,
        dtype: torch.dtype,
        device: torch.device,
        prompts: list[str],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.prompts, self.tokenizer = prompts, tokenizer
        self.regions = [TextRegion("text", tokenizer, size.text)]
        self.transformer = build(size, dtype, device)
        self.trained = [p for p in self.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)
        self.embeddings = TextEmbeddings(dtype, device)
        self.unconditional = self.embeddings([[tokenizer.pad_token_id] * size.text])
        t = torch.linspace(1, 0, size.steps + 1)
        self.sigmas: list[float] = (SHIFT * t / (1 + (SHIFT - 1) * t)).tolist()
        pairs = list(zip(self.sigmas[:-1], self.sigmas[1:], strict=True))
        self.transitions = [
            flow_sde(a, b, noise_level=NOISE_LEVEL, sigma_max=self.sigmas[1]).to(device) for a, b in pairs
        ]
        columns = [torch.tensor([[s] * size.batch for s in pair], device=device) for pair in pairs]
        self.schedule = [(first, then, self.sigmas[1]) for first, then in columns]  # arguments of flow_grpo_step

    def step(self, arm: Arm, number: int, optimise: bool = True) -> Tensor:
        """Runs rollout, rewards, advantages and update. Returns the loss, summed over the trained steps."""
        generator = torch.Generator().manual_seed(number)
        chosen = [self.prompts[(number * self.size.groups + g) % len(self.prompts)] for g in range(self.size.groups)]
        prompts = [p for p in chosen for _ in range(self.size.group)]
        text = self._doubled(encode(self.tokenizer, prompts, self.size.text))
        selection = None
        if arm.star:
            selection = select_tokens(prompts, self.regions).selection.to(self.device)
        trajectory = self.rollout(arm, text, selection, generator)
        rewards = torch.rand(self.size.groups, self.size.group, generator=generator)
        std = rewards.std(dim=1, keepdim=True) + 1e-4
        advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / std).flatten().to(self.device)
        return self.update(arm, text, trajectory[:-1], advantages, optimise)  # the last step is not trained

    @torch.no_grad()
    def rollout(
        self, arm: Arm, text: tuple[Tensor, Tensor], selection: TokenSelection | None, generator: torch.Generator
    ) -> list[Transition]:
        size = self.size
        shape = (size.batch, CHANNELS, size.latent, size.latent)
        latents = torch.randn(shape, generator=generator).to(self.device)
        trajectory = []
        capturing = nullcontext() if selection is None else capture_maps(self.transformer, selection, cfg="last")
        with capturing as maps:
            for i, transition in enumerate(self.transitions):
                velocity = self.velocity(latents, i, text)
                noise = torch.randn(shape, generator=generator).to(self.device)
                if arm.eager:
                    prev_sample, log_prob = flow_grpo_step(velocity, latents, *self.schedule[i], noise=noise)
                else:
                    prev_sample, log_prob = sample_transition(velocity, latents, transition, noise=noise)
                weights = None
                if maps is not None:
                    weights = allocate(maps.value[:, 0], layout="bhw", strength=arm.strength)
                trajectory.append(Transition(i, latents, prev_sample, log_prob, weights))
                latents = prev_sample
        return trajectory

    def update(
        self, arm: Arm, text: tuple[Tensor, Tensor], trajectory: list[Transition], advantages: Tensor, optimise: bool
    ) -> Tensor:
        total = torch.zeros((), device=self.device)
        for kept in trajectory:
            velocity = self.velocity(kept.sample, kept.step, text)
            if arm.eager:
                _, log_prob = flow_grpo_step(
                    velocity,
                    kept.sample,
                    *self.schedule[kept.step],
                    prev_sample=kept.prev_sample,
                )
                loss, _ = flow_grpo_loss(log_prob, kept.log_prob, advantages)
            else:
                loss, _ = weighted_policy_loss(
                    velocity,
                    kept.sample,
                    kept.prev_sample,
                    kept.log_prob,
                    advantages,
                    self.transitions[kept.step],
                    weights=kept.weights,
                    clip_range=CLIP_RANGE,
                    advantage_clip=ADVANTAGE_CLIP,
                )
            (loss / len(trajectory)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if optimise:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total

    def velocity(self, latents: Tensor, step: int, text: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity with classifier-free guidance: one forward pass of a doubled batch, conditional half last."""
        batch = 2 * self.size.batch
        output = self.transformer(
            hidden_states=torch.cat([latents, latents]).to(self.dtype),
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=torch.full((batch,), 1000 * self.sigmas[step], device=self.device),
            return_dict=False,
        )[0]
        without, conditional = output.chunk(2)
        guided: Tensor = without + GUIDANCE * (conditional - without)
        return guided

    def gradient(self, arm: Arm) -> tuple[Tensor, Tensor]:
        """Loss and gradient of step 0, without updating the weights."""
        loss = self.step(arm, 0, optimise=False)
        gradient = torch.cat([p.grad.flatten().float() for p in self.trained if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return loss, gradient

    def _doubled(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        conditional = self.embeddings(ids)
        tokens, pooled = (torch.cat([u.expand_as(c), c]) for u, c in zip(self.unconditional, conditional, strict=True))
        return tokens, pooled


def measure(request: Request, *, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Yields one case, in the dtype of the request.

    Only a thorough run includes the step with Flow-GRPO's arithmetic in eager PyTorch.
    """
    device, dtype, extent = request.device, request.dtype, request.extent
    size = size_for(device, request.batch, extent)
    title = "end to end"
    with Progress(f"{title} · checking", 0) as progress:
        # In float32 with two blocks: in 16 bits, rounding alone changes the step of a whole model by 6 %.
        progress.show("two blocks in float32")
        checked = replace(size, blocks=min(size.blocks, 2))
        trainer = Trainer(checked, torch.float32, device, prompts, tokenizer)
        differences = check_arms(trainer, progress)
        warm = (size, dtype) == (checked, torch.float32)  # the checked model is the measured one
        if not warm:
            progress.show("building the model")
            trainer = Trainer(size, dtype, device, prompts, tokenizer)
    arms = (PLAIN, STAR, EAGER) if extent == "thorough" else (PLAIN, STAR)
    variants = [Variant(arm.name, arm.label, Counted(trainer, arm)) for arm in arms]
    clock = CpuClock(device)
    times = interleave(variants, clock, request.budget, title, warm_up=0 if warm else 1)
    ratios = {"star_over_plain": ("OVERHEAD STAR / plain Flow-GRPO", "star", "plain")}
    if EAGER in arms:
        ratios["star_over_eager"] = ("STAR / plain Flow-GRPO, eager arithmetic", "star", "eager")
    name = str(dtype).removeprefix("torch.")
    case: dict[str, Any] = {
        "name": "smoke test" if extent == "quick" else "SD3.5-M step",
        "title": f"SD3.5-M, {size.blocks} of 24 blocks, {8 * size.latent}², {size.text} text tokens, {name}, "
        f"{size.batch} samples, {size.steps} steps, CFG",
        "size": asdict(size),
        "dtype": name,
        "clock": clock.name,
        **times.columns(variants, "plain"),
        "trained_parameters": sum(p.numel() for p in trainer.trained),
        "parameters": sum(p.numel() for p in trainer.transformer.parameters()),
        "ratios": times.ratios(ratios),
        "differences": differences,
        "core_words": [{"prompt": prompt, "core": " ".join(core_content(prompt).words)} for prompt in prompts[:3]],
    }
    case["notes"] = [
        f"each step: {size.steps} denoising steps, all but the last of which are trained, and one AdamW update",
        *filter(None, (times.note,)),
        *(f"core words of {prompt[:40]!r}...: {' '.join(core_content(prompt).words)}" for prompt in prompts[:3]),
    ]
    yield case


TOLERANCE = 1e-4  # relative RMS difference of gradients that sum in another order


def check_arms(trainer: Trainer, progress: Progress) -> dict[str, float]:
    """Checks that Flow-GRPO's eager arithmetic and STAR with uniform weights take the same step as plain Flow-GRPO.

    Raises:
        RuntimeError: if the gradients or the losses differ.
    """
    uniform = Arm("star_uniform", "STAR with uniform weights", star=True, strength=0.0)
    progress.show(PLAIN.label)
    trainer.step(PLAIN, 0)  # allocates the state of the optimiser
    loss, expected = trainer.gradient(PLAIN)
    differences = {}
    for arm in (EAGER, uniform):
        progress.show(arm.label)
        other_loss, gradient = trainer.gradient(arm)
        differences[arm.name] = float((gradient - expected).norm() / expected.norm())
        same = differences[arm.name] <= TOLERANCE and abs(float(other_loss - loss)) <= 1e-3
        if not same:
            raise RuntimeError(
                f"the step of '{arm.label}' differs from that of '{PLAIN.label}': loss {float(other_loss):.6g} and "
                f"{float(loss):.6g}, relative RMS differences of the gradients {differences}"
            )
    return differences


class Counted:
    """Runs a step with the number of the call, so that all arms of a round have the same prompts and noise."""

    def __init__(self, trainer: Trainer, arm: Arm) -> None:
        self.trainer, self.arm, self.number = trainer, arm, 0

    def __call__(self) -> Tensor:
        self.number += 1
        return self.trainer.step(self.arm, self.number)
