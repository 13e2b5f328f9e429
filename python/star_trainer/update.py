"""The update of an epoch: gradients of the policy loss over the trained steps, and optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from star_kernels import Transition, weighted_nft_loss, weighted_policy_loss
from star_kernels.integrations.agreement import Agreement, log_prob_agreement
from star_kernels.integrations.flow_grpo_policy import log_prob_of, mean_of
from star_trainer.average import Average
from star_trainer.config import Config
from star_trainer.credit import advantages_per_map
from star_trainer.objectives import clip_range
from star_trainer.policy import Policy, Text
from star_trainer.rewards.images import slices
from star_trainer.samples import Batch, Step
from star_trainer.weights import whole


def inner_optimizer(optimizer: Any) -> Any:
    """The PyTorch optimiser that accelerate's optimiser wraps."""
    return getattr(optimizer, "optimizer", optimizer)


class Updater:
    """Optimiser steps on batches of samples.

    Attributes:
        grad_norm: gradient norm of the latest optimiser step, before clipping.
        skipped: 1 if that step was skipped because its gradients are not finite, else 0; on the device.
        agreement: of each trained step of the first optimiser step of an epoch, how far the log-probabilities of the
            locations are from those of the rollout, with the same weights.
    """

    def __init__(self, policy: Policy, optimizer: Any, average: Average, accelerator: Any, config: Config) -> None:
        self.policy, self.optimizer, self.average = policy, optimizer, average
        self.accelerator, self.config = accelerator, config
        self.schedule = policy.schedule(config.rollout.steps)
        self.step_weights = self.schedule.step_weights(config)
        self.grad_norm = self.skipped = torch.zeros(())
        self.agreement: dict[int, Agreement] = {}
        self._compared: dict[int, list[tuple[int, Agreement]]] | None = None  # None: not in the first step

    def begin_epoch(self) -> None:
        """The weights are those of the rollout until the next optimiser step, unless it used the moving average."""
        self._compared, self.agreement = None if self.config.rollout.averaged else {}, {}

    def step(
        self, batches: Sequence[Batch], advantages: Tensor, report: Callable[[int], object] = lambda samples: None
    ) -> dict[str, Tensor]:
        """One optimiser step on a process's share of the samples.

        If gradients are not finite, the step is skipped. The decision is made on the device, without a host
        synchronisation.

        Args:
            batches: all with the same trained steps.
            advantages: :func:`star_trainer.credit.advantages_of` of all samples of the epoch, by number.
            report: called after each forward and backward pass with its number of samples.

        Returns:
            The metrics of the loss, averaged over samples and steps.
        """
        metrics = self.gradients(batches, advantages, report)
        if self._compared is not None:
            self.agreement = {number: _joined(found) for number, found in self._compared.items()}
            self._compared = None
        trained = list(self.average.parameters.values())
        norm = self.accelerator.clip_grad_norm_(trained, self.config.train.max_grad_norm or math.inf)
        self.grad_norm = whole(torch.as_tensor(norm).detach())
        self.skipped = (~self.grad_norm.isfinite()).float()  # the norm over all processes: equal in all
        inner_optimizer(self.optimizer).found_inf = self.skipped  # a fused optimiser skips the step on the device
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.skipped)
        return metrics

    def gradients(
        self, batches: Sequence[Batch], advantages: Tensor, report: Callable[[int], object] = lambda samples: None
    ) -> dict[str, Tensor]:
        """Accumulates the gradients of the loss, averaged over samples and trained steps."""
        total = sum(len(batch.numbers) for batch in batches)
        passes = [(b, rows, step) for b in batches for rows in self._rows(b) for step in b.steps]
        sums: dict[str, Tensor] = {}
        for i, (batch, rows, step) in enumerate(passes):
            share = (rows.stop - rows.start) / total / len(batch.steps)
            chosen = advantages[batch.numbers[rows]].to(self.policy.device)
            shares = None if batch.shares is None else batch.shares[rows]
            chosen = advantages_per_map(chosen, shares, self.config.allocation, self.config.train.advantage_clip)
            last = i == len(passes) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.policy.transformer):
                loss, metrics = self._loss(batch.text[rows], step.at(rows), chosen)
                self.accelerator.backward(loss * share)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value * share
            report(rows.stop - rows.start)
        return sums

    def _loss(self, text: Text, step: Step, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        train, timestep = self.config.train, self.schedule.timestep(step.number)
        ref_output = None
        if train.kl_coef > 0:
            with torch.no_grad(), self.accelerator.autocast():
                ref_output = self.policy.velocity(step.sample, timestep, text, reference=True)
        with self.accelerator.autocast():
            velocity = self.policy.velocity(step.sample, timestep, text)
        transition = self.schedule.transition(step.number, self.config, len(advantages), self.policy.device)
        if self._compared is not None:
            found = _agreement(velocity.detach(), step, transition)
            self._compared.setdefault(step.number, []).append((len(velocity), found))
        common: dict[str, Any] = {
            "weights": step.weights,
            "advantage_clip": train.advantage_clip,
            "ref_model_output": ref_output,
            "kl_coef": train.kl_coef,
        }
        if train.objective == "nft":
            assert step.model_output is not None
            sigma = torch.full_like(advantages, self.schedule.sigmas[step.number])
            loss, metrics = weighted_nft_loss(
                velocity, step.model_output, step.prev_sample, advantages, sigma, beta=train.nft_beta, **common
            )
            return loss, dict(metrics)
        if train.objective == "flow_dppo":
            common["kl_mask_threshold"] = train.kl_mask_threshold
        else:
            common["clip_range"] = clip_range(train)
        loss, metrics = weighted_policy_loss(
            velocity,
            step.sample,
            step.prev_sample,
            step.log_prob,
            advantages,
            _with_velocity_kl(transition) if train.kl == "velocity" else transition,
            ratio=train.ratio,
            old_model_output=step.model_output,
            step_weights=self._factors(step, velocity),
            **common,
        )
        return loss, dict(metrics)

    def _factors(self, step: Step, like: Tensor) -> Tensor | None:
        """The factor of the step's loss for each sample."""
        if self.step_weights is None:
            return None
        return torch.full((len(like),), self.step_weights[step.number], device=like.device)

    def _rows(self, batch: Batch) -> Iterator[slice]:
        """Slices of the batch, one for each forward pass."""
        count = len(batch.numbers)
        return slices(count, self.config.train.batch or count)


def _with_velocity_kl(transition: Transition) -> Transition:
    """The transition with a KL penalty of ``mean((v - v_ref)^2)``."""
    table = transition.coefficients.clone()
    table[5] = 1 / transition.mean_output.square()
    return Transition(table)


def _agreement(velocity: Tensor, step: Step, transition: Transition) -> Agreement:
    mean = mean_of(velocity.float(), step.sample.float(), transition)
    return log_prob_agreement(log_prob_of(mean, step.prev_sample.float(), transition, 1), step.log_prob)


def _joined(found: list[tuple[int, Agreement]]) -> Agreement:
    """Of several batches: each with its number of samples."""
    mean = sum((rows * each.mean for rows, each in found), torch.zeros(())) / sum(rows for rows, _ in found)
    return Agreement(mean, torch.stack([each.max for _, each in found]).amax())
