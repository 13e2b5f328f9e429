"""The loop: rollouts, rewards, advantages, updates, and what is kept and shown of them."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from star_trainer import checkpoint
from star_trainer.average import Average
from star_trainer.config import Config
from star_trainer.credit import advantages_of, check_rewards, cores_of
from star_trainer.limits import check
from star_trainer.policy import Policy
from star_trainer.prompt_checks import check_prompts
from star_trainer.prompts import Prompt, choose, load_prompts
from star_trainer.record import Record
from star_trainer.rewards import build
from star_trainer.rewards.base import RewardError, Scores
from star_trainer.rewards.images import slices
from star_trainer.rewards.service import RewardService
from star_trainer.rollout import Batch, capture, roll_out, sample
from star_trainer.schedule import shares
from star_trainer.update import Updater

log = logging.getLogger("star_trainer")


class Trainer:
    """A run of a configuration, on one or more processes of accelerate.

    Attributes:
        epoch: epochs done.
    """

    def __init__(self, config: Config, accelerator: Accelerator | None = None, *, progress: bool = True) -> None:
        self.config = config
        self.accelerator = accelerator or Accelerator(mixed_precision=config.train.mixed_precision)
        check(config, self.accelerator.num_processes)
        if config.train.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ValueError("train.mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'")
        self.prompts = load_prompts(config.data.prompts)
        held_out = config.data.eval_prompts or config.data.prompts
        self.eval_prompts = load_prompts(held_out, seed="evaluation", setting="data.eval_prompts")
        reward = build(config.reward.weights, device=str(self.accelerator.device), options=config.reward.options)
        check_rewards(reward, config.allocation)
        check_prompts(self.prompts, self.eval_prompts, reward, config)
        self.policy = Policy(config, self.accelerator.device)
        self.policy.latent_shape(config.rollout.resolution)
        if config.allocation.method == "star":
            capture(self.policy, None, config).remove()  # blocks that the model has not are refused now
        trained = [p for p in self.policy.transformer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, config.train.learning_rate, weight_decay=config.train.weight_decay)
        self.policy.transformer, self.optimizer = self.accelerator.prepare(self.policy.transformer, optimizer)
        self.average = Average(self.policy.model, config.train.ema, config.train.ema_interval)
        self.updater = Updater(self.policy, self.optimizer, self.average, self.accelerator, config)
        self.rewards = RewardService(
            reward,
            timeout=config.reward.timeout,
            on_failure=config.reward.on_failure,
        )
        self.epoch = self._saved = 0
        self.stopped = False
        self.folder = Path(config.output.folder)
        if found := checkpoint.find(self.folder):
            if not config.output.resume:
                raise ValueError(
                    f"output.folder {self.folder} holds {found[-1].name} of another run: set output.resume to go on "
                    "with that, or choose another folder"
                )
            self.epoch = self._saved = checkpoint.restore(found[-1], *self._state(), config)
            log.info("resumed from %s", found[-1])
        self.record = Record(config, enabled=self.accelerator.is_main_process, resumed_at=self.epoch)
        self.progress = progress and self.accelerator.is_main_process

    def run(self) -> None:
        """Trains to the last epoch, or until a signal to terminate, and leaves a checkpoint and the trained weights."""
        config = self.config
        previous = self._catch_signals()
        try:
            if self.epoch == 0 and config.evaluation.every:
                self.evaluate()
            bar = tqdm(range(self.epoch, config.train.epochs), desc="epochs", disable=self._quiet)
            for _ in bar:
                metrics = self.train_epoch()
                bar.set_postfix(reward=f"{metrics['reward']:.3f}")
                if bar.disable and self.progress:
                    log.info("epoch %d: reward %.4f", self.epoch, metrics["reward"])
                finished = self.epoch == config.train.epochs
                last = finished or self._must_stop()
                every = config.output.checkpoint_every
                if last or (every and self.epoch % every == 0):
                    self._save()
                if config.evaluation.every and (finished or self.epoch % config.evaluation.every == 0):
                    self.evaluate()
                if last:
                    break
            self._export()
        except RewardError:  # in a rollout or an evaluation: the weights are those of the last whole epoch
            self._save()
            raise
        finally:
            self.rewards.close()
            self.record.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def train_epoch(self) -> dict[str, float]:
        """One rollout of all samples, and its updates. Returns what is recorded of it."""
        config, size = self.config, self.config.rollout.group_size
        started = time.perf_counter()
        prompts = choose(self.prompts, config.rollout.groups, self.epoch, config.train.seed)
        phrases = self._phrases(prompts)
        parts = shares(config, self.epoch, self.accelerator.num_processes, self.accelerator.process_index)
        waiting, batches = [], list[list[Batch]]()
        with self._bar("rollout", sum(map(len, parts))) as bar:
            for part in parts:
                batches.append([])
                for rows in slices(len(part), config.rollout.batch):
                    numbers = part[rows]
                    chosen = [prompts[n // size] for n in numbers]
                    batch = self.roll_out(chosen, numbers)
                    batches[-1].append(batch)
                    counts = phrases and [phrases[n // size] for n in numbers]
                    waiting.append((numbers, self._submit(batch.images, chosen, numbers, counts)))
                    bar.update(len(numbers))
        rolled_out = time.perf_counter()
        rewards = self._collect(waiting, config.samples, max([1, *phrases]) if phrases else 0)
        judged = time.perf_counter()
        advantages = advantages_of(rewards, config)
        metrics: dict[str, float] = {}
        passes = config.train.passes * sum(len(b.numbers) * len(b.steps) for part in batches for b in part)
        with self._bar("update", passes) as bar:
            for part_batches in batches * config.train.passes:
                reported = self.updater.step(part_batches, advantages.values, bar.update)
                for name, value in {**reported, "grad_norm": self.updater.grad_norm}.items():
                    share = 1 / (config.train.passes * len(batches))
                    metrics[name] = metrics.get(name, 0.0) + self._mean(value) * share
        self.epoch += 1
        known = rewards.total[rewards.total.isfinite()]
        recorded = {
            "reward": known.mean().item(),
            "reward_std": known.std(correction=0).item(),
            **{f"reward/{name}": values[values.isfinite()].mean().item() for name, values in rewards.parts.items()},
            "skipped": float(config.samples - len(known)),
            "flat_groups": float(advantages.flat_groups),
            **{f"loss/{name}": value for name, value in metrics.items()},
            "seconds/rollout": rolled_out - started,
            "seconds/rewards": judged - rolled_out,
            "seconds/update": time.perf_counter() - judged,
        }
        self.record.metrics("epoch", self.epoch, recorded)
        every = config.output.pictures_every
        if every and (self.epoch == 1 or self.epoch % every == 0):
            self.record.allocation(self.epoch, batches[0][0])
        return recorded

    def roll_out(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> Batch:
        """Samples of these numbers in this epoch; a subclass may put other weights on their steps."""
        return roll_out(self.policy, prompts, numbers, self.config, self.epoch, self.accelerator.autocast)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Rewards of samples of the averaged weights without noise; the same prompts and noise each time."""
        config, count = self.config, self.config.evaluation.prompts
        prompts = [self.eval_prompts[n % len(self.eval_prompts)] for n in range(count)]
        mine = list(range(self.accelerator.process_index, count, self.accelerator.num_processes))
        waiting, images = [], dict[int, Tensor]()
        with self.average.in_place(), self._bar("evaluation", len(mine)) as bar:
            for rows in slices(len(mine), config.rollout.batch):
                numbers = mine[rows]
                chosen = [prompts[n] for n in numbers]
                names = [f"evaluation {config.train.seed} {n}" for n in numbers]
                drawn = sample(self.policy, chosen, names, config, self.accelerator.autocast)
                images.update(zip(numbers, drawn, strict=True))
                waiting.append((numbers, self._submit(drawn, chosen, numbers)))
                bar.update(len(numbers))
        rewards = self._collect(waiting, count)
        recorded = {f"reward/{n}": v[v.isfinite()].mean().item() for n, v in rewards.parts.items()}
        recorded["reward"] = rewards.total[rewards.total.isfinite()].mean().item()
        self.record.metrics("evaluation", self.epoch, recorded)
        texts = [prompts[n].text for n in images]
        scores = rewards.total[list(images)].tolist()
        self.record.samples(self.epoch, list(images.values()), texts, scores)
        return recorded

    @property
    def _quiet(self) -> bool | None:
        """For tqdm: None shows bars on a terminal alone; elsewhere each epoch is a line of the log."""
        return None if self.progress else True

    def _bar(self, name: str, samples: int) -> Any:
        return tqdm(total=samples, desc=name, unit="sample", leave=False, disable=self._quiet)

    def _phrases(self, prompts: Sequence[Prompt]) -> list[int] | None:
        """How many phrases each prompt has, with credit by phrase."""
        if self.config.allocation.credit == "image":
            return None
        return [len(core.phrases) for core in cores_of(prompts, self.config.allocation)]

    def _submit(
        self, images: Tensor, prompts: Sequence[Prompt], numbers: list[int], phrases: list[int] | None = None
    ) -> Any:
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        return self.rewards.submit(images, texts, metadata, indices=numbers, phrases=phrases)

    def _collect(self, waiting: list[tuple[list[int], Any]], count: int, phrases: int = 0) -> Scores:
        """Rewards of all processes, of all samples by number, and of so many phrases."""
        names = list(self.rewards.reward.rewards)  # a reward by import path or URL has a name of its own
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
            raise failure or RewardError("a reward failed in another process, whose message says why")
        whole = self.accelerator.reduce(table.to(self.accelerator.device), "sum").cpu()
        if not whole[0].isfinite().any():
            raise RewardError(f"after epoch {self.epoch} all {count} samples are without a reward; warnings say why")
        parts = dict(zip(names, whole[1:first], strict=True))
        return Scores(whole[0], parts, whole[first:].T if phrases else None)

    def _mean(self, value: Tensor) -> float:
        """Over processes."""
        return float(self.accelerator.reduce(value.detach().float().to(self.accelerator.device), "mean").item())

    def _state(self) -> tuple[Any, Any, Average, Any]:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        return self.policy.transformer, inner, self.average, self.accelerator

    def _save(self) -> None:
        if self.epoch > self._saved:
            checkpoint.save(self.folder, self.epoch, *self._state(), self.config)
            self._saved = self.epoch

    def _export(self) -> None:
        with self.average.in_place():
            self.policy.export(self.folder / "final", write=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()

    def _catch_signals(self) -> dict[int, Any]:
        """A signal to terminate ends the run after the epoch, with a checkpoint."""

        def stop(number: int, frame: Any) -> None:
            self.stopped = True
            log.warning("signal %d: this epoch is finished and saved, then the run ends", number)

        try:
            return {number: signal.signal(number, stop) for number in (signal.SIGTERM,)}
        except ValueError:  # not in the main thread
            return {}

    def _must_stop(self) -> bool:
        flag = torch.tensor([float(self.stopped)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())
