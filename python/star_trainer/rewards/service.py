"""Scores batches in a thread of its own."""

from __future__ import annotations

import math
import queue
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # the built-in one from Python 3.11 on
from dataclasses import replace
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from star_trainer.rewards.base import Metadata, Reward, RewardError, Scores
from star_trainer.rewards.scoring import Batch, score
from star_trainer.rewards.weighted import WeightedSum
from star_trainer.rewards.worker import Worker

_RANGE_SLACK = 1e-4  # tolerance for rounding errors of a decoder


class Pending:
    """The future scores of a submitted batch."""

    def __init__(self) -> None:
        self._future: Future[tuple[Scores, list[str]]] = Future()
        self._warned = False

    def done(self) -> bool:
        """Whether ``result`` returns or raises without waiting."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Scores:
        """Waits for the scores. Skipped samples are NaN; the first call warns (RuntimeWarning) about each of them.

        Raises:
            RewardError: a reward failed, with ``on_failure="stop"``.
            TimeoutError: there is no result after ``timeout`` seconds; None waits without a limit.
        """
        try:
            scores, notes = self._future.result(timeout)
        except FutureTimeout:
            raise TimeoutError(f"no scores after {timeout:g} s") from None
        if not self._warned:
            self._warned = True
            for note in notes:
                warnings.warn(note, RuntimeWarning, stacklevel=2)
        return scores


class RewardService:
    """Scores batches in a daemon thread, in the order in which they are submitted.

    A reward fails on a sample if it raises, does not return one finite number per sample, or exceeds the timeout. If a
    call for several samples raises or returns a wrong shape, the samples are scored one by one to find those that fail.
    A call that exceeds the timeout is abandoned with all its samples, and a new thread continues; the abandoned thread
    lives until its call returns, so that a reward should not hold a lock during a call that may hang. A failure does
    not affect other batches.

    Args:
        reward: a reward, or a :class:`WeightedSum`, whose parts are called, timed and reported separately.
        timeout: maximum time of one call of one reward, in seconds.
        on_failure: "stop": ``result()`` raises RewardError. "skip": the score and the total of the samples are NaN, and
            ``result()`` warns about each; other samples keep their scores.
        batch_size: maximum number of samples per call; None is the whole batch.

    Raises:
        ValueError: a timeout or batch size that is not positive, or an unknown ``on_failure``.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        timeout: float = 600.0,
        on_failure: Literal["stop", "skip"] = "stop",
        batch_size: int | None = None,
    ) -> None:
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        if on_failure not in ("stop", "skip"):
            raise ValueError(f"on_failure must be 'stop' or 'skip', got {on_failure!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
        self.reward = (
            reward if isinstance(reward, WeightedSum) else WeightedSum({reward.name: reward}, {reward.name: 1})
        )
        self.timeout = timeout
        self.on_failure = on_failure
        self.batch_size = batch_size
        self._jobs: queue.SimpleQueue[tuple[Batch, Pending] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="rewards", daemon=True).start()

    def submit(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        *,
        indices: Sequence[int],
        phrases: Sequence[int] | None = None,
    ) -> Pending:
        """Queues a batch and returns at once.

        Args:
            images: float ``[N, 3, H, W]`` in 0..1; must not change until the result is available. A sample fails if its
                image is not finite.
            prompts: N texts.
            metadata: N records.
            indices: the caller's numbers of the samples, for messages.
            phrases: number of phrases of each prompt, to score phrases as well; None does not score them. Each reward
                must be a :class:`PhraseReward` or have weight 0. A reward that scores another number of phrases fails
                on the sample.

        Raises:
            ValueError: shapes or lengths that do not match, or images outside 0..1.
            RuntimeError: the service is closed.
        """
        batch = _batch(images, prompts, metadata, indices, phrases)
        pending = Pending()
        with self._lock:
            if self._closed:
                raise RuntimeError("the reward service is closed")
            self._jobs.put((batch, pending))
        return pending

    def close(self) -> None:
        """Stops accepting batches, without waiting; submitted batches are still scored. May be called repeatedly."""
        with self._lock:
            self._closed = True
            self._jobs.put(None)

    def __enter__(self) -> RewardService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        worker = Worker("reward call")
        while (job := self._jobs.get()) is not None:
            batch, pending = job
            try:
                pending._future.set_result(self._score(batch, worker))
            except BaseException as error:
                pending._future.set_exception(error)
            del job, batch, pending  # an idle thread keeps no images
        worker.leave()

    def _score(self, batch: Batch, worker: Worker) -> tuple[Scores, list[str]]:
        """The scores and the warnings."""
        stop = self.on_failure == "stop"
        parts: dict[str, Tensor] = {}
        phrases: dict[str, Tensor] = {}
        notes: list[str] = []
        for key, reward in self.reward.rewards.items():
            asked = batch if self.reward.weights[key] else replace(batch, phrases=None)
            scores, failures = score(reward, asked, worker, timeout=self.timeout, batch_size=self.batch_size, stop=stop)
            parts[key] = scores[:, 0]
            if asked.phrases is not None:
                phrases[key] = scores[:, 1:]
            for failure in failures:
                if stop and failure.rows:
                    raise RewardError(failure.describe(key, batch)) from failure.error
                notes += failure.notes(key, batch)
        return self.reward.combine(parts, phrases), notes


def _batch(
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    indices: Sequence[int],
    phrases: Sequence[int] | None,
) -> Batch:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [N, 3, H, W], got {images.dtype} {tuple(images.shape)}")
    count = len(images)
    counts = range(count) if phrases is None else phrases
    for name, values in (("prompts", prompts), ("metadata", metadata), ("indices", indices), ("phrases", counts)):
        if isinstance(values, str) or len(values) != count:
            raise ValueError(f"{name} must have one entry for each of {count} images, got {len(values)}")
    images = images.detach().to("cpu", torch.float32)
    finite = images[images.isfinite()]
    if finite.numel() and not (finite.min() >= -_RANGE_SLACK and finite.max() <= 1 + _RANGE_SLACK):
        raise ValueError(f"images must be in 0..1, got {finite.min().item():g}..{finite.max().item():g}")
    numbers = None if phrases is None else list(phrases)
    return Batch(images, list(prompts), list(metadata), [int(index) for index in indices], numbers)
