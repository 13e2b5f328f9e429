"""The training loop: rollouts, rewards, updates, evaluations and checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from star_trainer import checkpoint
from star_trainer.average import Average
from star_trainer.config import Config
from star_trainer.credit import advantages_of, capture, check_rewards, phrase_counts
from star_trainer.limits import check
from star_trainer.lock import lock, unlock
from star_trainer.policy import Policy
from star_trainer.progress import Progress
from star_trainer.prompt_checks import check_prompts
from star_trainer.prompts import Prompt, choose, digest, load_prompts
from star_trainer.record import Record
from star_trainer.restore import restore
from star_trainer.rewards import build
from star_trainer.rewards.base import RewardError, Scores
from star_trainer.rewards.images import slices
from star_trainer.rewards.service import RewardService
from star_trainer.rollout import roll_out, sample
from star_trainer.samples import Batch
from star_trainer.saving import Saver
from star_trainer.schedule import shares
from star_trainer.signals import Signals
from star_trainer.update import Updater, inner_optimizer
from star_trainer.weights import check_finite

log = logging.getLogger("star_trainer")

PATIENCE = 10  # consecutive skipped steps that end a run; the loss scale of float16 takes several to adapt


class Trainer:
    """A training run, on one or more processes of accelerate.

    Attributes:
        epoch: number of completed epochs.
        stopped: set it to end the run after the current epoch.
    """

    def __init__(self, config: Config, accelerator: Accelerator | None = None, *, progress: bool = True) -> None:
        self.config = config
        self.folder = Path(config.output.folder).absolute()  # a reward may change the working directory
        self.accelerator = accelerator or Accelerator(mixed_precision=config.train.mixed_precision)
        check(config, self.accelerator.num_processes)
        accumulated = self.accelerator.gradient_accumulation_steps
        if accumulated != 1:  # accelerate would divide the gradients by it
            raise ValueError(
                f"accelerate's gradient_accumulation_steps must be 1, got {accumulated}: set train.batch (samples of a "
                "forward pass) and train.updates (optimiser steps) instead"
            )
        if config.train.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ValueError("train.mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'")
        source = config.allocation.source
        self.prompts = load_prompts(config.data.prompts, core_source=source)
        held_out = config.data.eval_prompts or config.data.prompts
        self.eval_prompts = load_prompts(held_out, seed="evaluation", setting="data.eval_prompts", core_source=source)
        try:
            reward = build(config.reward.weights, device=str(self.accelerator.device), options=config.reward.options)
        except TypeError as error:
            raise ValueError(f"reward.weights: {error}") from error
        check_rewards(reward, config.allocation)
        check_prompts(self.prompts, self.eval_prompts, reward, config)
        if self.accelerator.is_main_process:
            lock(self.folder)
            checkpoint.clean(self.folder)
        found = checkpoint.find(self.folder)
        if found and not config.output.resume:
            raise ValueError(
                f"output.folder {self.folder} contains {found[-1].name} of another run: set output.resume to resume "
                "that run, or choose another folder"
            )
        self.policy = Policy(config, self.accelerator.device)
        self.policy.latent_shape(config.rollout.resolution)
        if config.allocation.method == "star":
            capture(self.policy, None, config).remove()  # raises if the model does not have these blocks
        trained = [p for p in self.policy.transformer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, config.train.learning_rate, weight_decay=config.train.weight_decay, fused=True
        )
        self.policy.transformer, self.optimizer = self.accelerator.prepare(self.policy.transformer, optimizer)
        self.average = Average(self.policy.model, config.train.ema, config.train.ema_interval)
        self.updater = Updater(self.policy, self.optimizer, self.average, self.accelerator, config)
        self.rewards = RewardService(
            reward,
            timeout=config.reward.timeout,
            on_failure=config.reward.on_failure,
        )
        live = checkpoint.Live(
            self.policy.transformer,
            inner_optimizer(self.optimizer),
            self.average,
            self.accelerator,
            config,
            digest(self.prompts),
            self.policy.loaded,
        )
        self.saver = Saver(live, self.folder, config.output.keep)
        self.epoch = 0
        self._shown: tuple[Batch, Tensor] | None = None  # a batch of the latest epoch and its rewards, for figures
        self._skipped_in_a_row = 0
        self.stopped = False
        if found:
            self.epoch = self.saver.saved = restore(found[-1], live)
            log.info("resumed from %s", found[-1])
            if self.epoch >= config.train.epochs:
                log.warning(
                    "no epoch is left to train: %d are completed, train.epochs is %d", self.epoch, config.train.epochs
                )
        self.record = Record(
            config, enabled=self.accelerator.is_main_process, resumed_at=self.epoch, folder=self.folder
        )
        self.progress = Progress(config, enabled=progress and self.accelerator.is_main_process)

    def run(self) -> None:
        """Trains until the last epoch or a signal, then writes a checkpoint and exports the trained weights.

        Completed epochs are saved even if an exception ends the run.
        """
        try:
            with Signals(self.saver.save_at_once) as signals:
                self._signals = signals
                try:
                    self._run()
                except BaseException:
                    self.saver.rescue()
                    raise
        finally:
            self.rewards.close()
            self.record.close()
            unlock(self.folder)

    def _run(self) -> None:
        config = self.config
        self.progress.header(self.policy.model, self.accelerator.device, self.accelerator.num_processes, self.folder)
        if self._lacks_evaluation():
            self.evaluate()
        while self.epoch < config.train.epochs and not self._must_stop():
            metrics = self.train_epoch()
            self.saver.keep(self.epoch)
            self.progress.epoch(self.epoch, metrics)
            stopping, every = self._must_stop(), config.output.checkpoint_every
            if stopping or self.epoch == config.train.epochs or (every and self.epoch % every == 0):
                self.saver.save()
            if self._shown is not None:
                self.record.allocation(self.epoch, *self._shown)
                self._shown = None
            if self._evaluates() and not stopping:  # a resumed run evaluates first
                self.evaluate()
        self._export()

    def train_epoch(self) -> dict[str, float]:
        """A rollout of all samples and its updates. Returns the recorded metrics."""
        config, size = self.config, self.config.rollout.group_size
        started = time.perf_counter()
        prompts = choose(self.prompts, config.rollout.groups, self.epoch, config.train.seed)
        phrases = phrase_counts(prompts, config.allocation)
        parts = shares(config, self.epoch, self.accelerator.num_processes, self.accelerator.process_index)
        waiting, batches = [], list[list[Batch]]()
        with self.progress.bar("rollout", sum(map(len, parts))) as bar:
            for part in parts:
                batches.append([])
                for rows in slices(len(part), config.rollout.batch):
                    numbers = part[rows]
                    chosen = [prompts[n // size] for n in numbers]
                    batch = self.roll_out(chosen, numbers)
                    self._check_weights(batch.images)
                    batches[-1].append(batch)
                    counts = phrases and [phrases[n // size] for n in numbers]
                    waiting.append((numbers, self._submit(batch.images, chosen, numbers, counts)))
                    bar.update(len(numbers))
        rolled_out = time.perf_counter()
        rewards = self._collect(waiting, config.samples, max([1, *phrases]) if phrases else 0)
        judged = time.perf_counter()
        advantages = advantages_of(rewards, config)
        metrics: dict[str, float] = {}
        skipped = 0
        self.updater.begin_epoch()
        passes = config.train.passes * sum(len(b.numbers) * len(b.steps) for part in batches for b in part)
        with self.progress.bar("update", passes) as bar:
            for part_batches in batches * config.train.passes:
                reported = {**self.updater.step(part_batches, advantages.values, bar.update)}
                reported["grad_norm"] = self.updater.grad_norm
                values = {name: self._mean(value) for name, value in reported.items()}
                if self._mean(self.updater.skipped):
                    skipped += 1
                    self._count_skipped(values)
                    continue
                self._skipped_in_a_row = 0
                for name, value in values.items():
                    metrics[name] = metrics.get(name, 0.0) + value
        taken = max(1, config.train.passes * len(batches) - skipped)
        self.epoch += 1
        known = rewards.total[rewards.total.isfinite()]
        recorded = {
            "reward": known.mean().item(),
            "reward_std": known.std(correction=0).item(),
            **{f"reward/{name}": values[values.isfinite()].mean().item() for name, values in rewards.parts.items()},
            "skipped": float(config.samples - len(known)),
            "flat_groups": float(advantages.flat_groups),
            "skipped_steps": float(skipped),
            **{f"loss/{name}": value / taken for name, value in metrics.items()},
            **self._agreement(),
            "seconds/rollout": rolled_out - started,
            "seconds/rewards": judged - rolled_out,
            "seconds/update": time.perf_counter() - judged,
        }
        self.record.metrics("epoch", self.epoch, recorded)
        self._shown = batches[0][0], rewards.total[batches[0][0].numbers]
        return recorded

    def roll_out(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> Batch:
        """Draws the samples with these numbers in this epoch; a subclass may replace the weights of their steps."""
        return roll_out(self.policy, prompts, numbers, self.config, self.epoch, self.accelerator.autocast)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Rewards of images of the averaged weights, drawn by ODE steps from always the same prompts and noise."""
        config, count = self.config, self.config.evaluation.prompts
        prompts = [self.eval_prompts[n % len(self.eval_prompts)] for n in range(count)]
        mine = list(range(self.accelerator.process_index, count, self.accelerator.num_processes))
        waiting, images = [], dict[int, Tensor]()
        with self.average.in_place(), self.progress.bar("evaluation", len(mine)) as bar:
            for rows in slices(len(mine), config.rollout.batch):
                numbers = mine[rows]
                chosen = [prompts[n] for n in numbers]
                names = [f"evaluation {config.train.seed} {n}" for n in numbers]
                drawn = sample(self.policy, chosen, names, config, self.accelerator.autocast)
                self._check_weights(drawn)
                images.update(zip(numbers, drawn, strict=True))
                waiting.append((numbers, self._submit(drawn, chosen, numbers)))
                bar.update(len(numbers))
        rewards = self._collect(waiting, count)
        recorded = {f"reward/{n}": v[v.isfinite()].mean().item() for n, v in rewards.parts.items()}
        recorded["reward"] = rewards.total[rewards.total.isfinite()].mean().item()
        self.record.metrics("evaluation", self.epoch, recorded)
        self.progress.evaluation(self.epoch, recorded["reward"])
        texts = [prompts[n].text for n in images]
        scores = rewards.total[list(images)].tolist()
        self.record.samples(self.epoch, list(images.values()), texts, scores)
        return recorded

    def _submit(
        self, images: Tensor, prompts: Sequence[Prompt], numbers: list[int], phrases: list[int] | None = None
    ) -> Any:
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        return self.rewards.submit(images, texts, metadata, indices=numbers, phrases=phrases)

    def _collect(self, waiting: list[tuple[list[int], Any]], count: int, phrases: int = 0) -> Scores:
        """The rewards of all samples by number, from all processes, with the given number of phrase columns."""
        names = list(self.rewards.reward.rewards)  # of an import path or a URL, the reward's own name
        first = 1 + len(names)
        table = torch.zeros(first + phrases, count)
        failure: RewardError | None = None
        for numbers, future in waiting:
            try:
                scores = future.result()
            except RewardError as error:
                failure = error
                break
            table[:first, numbers] = torch.stack([scores.total, *(scores.parts[name] for name in names)])
            if scores.phrases is not None:
                table[first:, numbers] = torch.nan
                table[first : first + scores.phrases.shape[1], numbers] = scores.phrases.T
        failed = torch.tensor([float(failure is not None)], device=self.accelerator.device)
        if self.accelerator.reduce(failed, "sum").item():  # all processes stop, or none
            raise failure or RewardError("a reward failed in another process: see its error message")
        whole = self.accelerator.reduce(table.to(self.accelerator.device), "sum").cpu()
        if not whole[0].isfinite().any():
            raise RewardError(
                f"after epoch {self.epoch} none of the {count} samples has a reward: see the warnings above"
            )
        parts = dict(zip(names, whole[1:first], strict=True))
        return Scores(whole[0], parts, whole[first:].T if phrases else None)

    def _check_weights(self, images: Tensor) -> None:
        """Raises FloatingPointError if images are not finite because the weights are not."""
        if not images.isfinite().all():
            weights = {n: getattr(p, "to_local", lambda p=p: p)() for n, p in self.average.parameters.items()}
            check_finite(f"the weights after epoch {self.epoch}", weights)

    def _count_skipped(self, values: dict[str, float]) -> None:
        """Raises FloatingPointError after PATIENCE consecutive steps whose gradients are not finite."""
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row < PATIENCE:
            return
        bad = [name for name, value in values.items() if name != "grad_norm" and not math.isfinite(value)]
        cause = f"the loss is not finite either ({', '.join(bad)})" if bad else "the loss is finite"
        raise FloatingPointError(
            f"the gradients of {PATIENCE} consecutive optimiser steps, up to epoch {self.epoch + 1}, are not finite; "
            f"{cause}. These steps were skipped and did not change the weights. Check train.mixed_precision "
            f"({self.config.train.mixed_precision!r}), model.dtype ({self.config.model.dtype!r}) and "
            f"train.learning_rate ({self.config.train.learning_rate:g})"
        )

    def _agreement(self) -> dict[str, float]:
        """The agreement of rollout and training by step, over processes, from the first optimiser step of the epoch."""
        recorded = {}
        for number, found in self.updater.agreement.items():
            name = f"log_prob_diff/step_{number}"
            recorded[f"{name}/mean"] = self._mean(found.mean)
            largest = found.max.to(self.accelerator.device)[None]
            recorded[f"{name}/max"] = float(self.accelerator.gather(largest).amax())
        return recorded

    def _mean(self, value: Tensor) -> float:
        """The mean over processes."""
        return float(self.accelerator.reduce(value.detach().float().to(self.accelerator.device), "mean").item())

    def _export(self) -> None:
        folder = self.folder / "final"
        try:
            with self.average.in_place():
                self.policy.export(folder, write=self.accelerator.is_main_process)
        except SafetensorError as error:
            raise OSError(f"{folder} cannot be written: {error}") from error
        self.accelerator.wait_for_everyone()

    def _evaluates(self) -> bool:
        """Whether this epoch is followed by an evaluation."""
        every = self.config.evaluation.every
        return bool(every) and (self.epoch % every == 0 or self.epoch == self.config.train.epochs)

    def _lacks_evaluation(self) -> bool:
        """Whether the evaluation of this epoch is missing, for example because the run was killed before it."""
        lacks = self.accelerator.is_main_process and self.epoch not in self.record.evaluated
        return self._evaluates() and self._any(lacks)

    def _must_stop(self) -> bool:
        return self._any(self.stopped or self._signals.stopped)

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        value = torch.tensor([float(flag)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(value, "sum").item())
