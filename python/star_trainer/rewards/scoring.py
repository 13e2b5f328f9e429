"""Scores one batch with one reward, and finds the samples that it fails on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from star_trainer.redact import redact
from star_trainer.rewards.base import Metadata, PhraseReward, Reward
from star_trainer.rewards.images import slices
from star_trainer.rewards.weighted import as_scores, copied, problem_with
from star_trainer.rewards.worker import Hung, Worker

_NAMED = 4  # maximum number of samples that a message describes by their prompts


@dataclass(frozen=True)
class Batch:
    """Images with their prompts and metadata.

    Attributes:
        indices: the caller's numbers of the samples, for messages.
        phrases: number of phrases of each prompt if they are to be scored, else None.
    """

    images: Tensor
    prompts: list[str]
    metadata: list[Metadata]
    indices: list[int]
    phrases: list[int] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, rows: Sequence[int]) -> tuple[Tensor, list[str], list[Metadata]]:
        """The arguments of a reward for some rows: copies, which the reward may change."""
        prompts, metadata = [self.prompts[row] for row in rows], [copied(self.metadata[row]) for row in rows]
        return self.images[list(rows)], prompts, metadata

    def columns(self, row: int) -> int:
        """Number of columns of a row: its score, and one for each phrase."""
        return 1 + (self.phrases[row] if self.phrases else 0)

    def describe(self, row: int) -> str:
        """The index and the prompt of a sample, for messages."""
        return f"sample {self.indices[row]} ({shorten(self.prompts[row])!r})"


@dataclass(frozen=True)
class Failure:
    """Why a reward did not score some rows of a batch; without rows, why a call for several rows had to be split."""

    rows: tuple[int, ...]
    cause: str
    error: BaseException | None = None

    def describe(self, reward: str, batch: Batch) -> str:
        """A message with the reward, the samples and the cause."""
        named = ", ".join(map(batch.describe, self.rows[:_NAMED]))
        more = ", ".join(str(batch.indices[row]) for row in self.rows[_NAMED:])
        return f"reward {reward!r} failed on {named}{f' and samples {more}' if more else ''}: {self.cause}"

    def notes(self, reward: str, batch: Batch) -> list[str]:
        """The warnings if the samples are skipped, one for each sample."""
        if not self.rows:
            return [f"reward {reward!r} failed on several samples together, but on none of them alone: {self.cause}"]
        alone = [Failure((row,), self.cause) for row in self.rows]
        return [f"{failure.describe(reward, batch)}; the sample is skipped" for failure in alone]


def score(
    reward: Reward, batch: Batch, worker: Worker, *, timeout: float, batch_size: int | None, stop: bool
) -> tuple[Tensor, list[Failure]]:
    """Scores a batch and reports failures.

    If a call for several samples raises, or does not return one number per sample, it is repeated for each sample. A
    call that exceeds the timeout is not repeated: all of its samples fail.

    Args:
        timeout: maximum time of one call, in seconds.
        batch_size: maximum number of samples per call; None is unlimited.
        stop: return at the first failure, without scoring the remaining rows.

    Returns:
        float32 ``[N, 1 + G]``: the score and the scores of phrases, NaN if missing or not finite; and the failures.
    """
    scores = torch.full((len(batch), max(map(batch.columns, range(len(batch))), default=1)), math.nan)
    failures = [
        Failure((row,), "the image contains NaN or infinity")
        for row, image in enumerate(batch.images)
        if not image.isfinite().all()
    ]
    bad = {row for failure in failures for row in failure.rows}
    good = [row for row in range(len(batch)) if row not in bad]
    for part in slices(len(good), batch_size or max(len(good), 1)):
        if stop and _lost(failures):
            break
        failures += _score_rows(reward, batch, good[part], scores, worker, timeout, stop)
    return scores, failures


def _score_rows(
    reward: Reward, batch: Batch, rows: list[int], scores: Tensor, worker: Worker, timeout: float, stop: bool
) -> list[Failure]:
    """Fills ``scores`` at ``rows``; returns the failures."""
    arguments, columns = batch.at(rows), [batch.columns(row) for row in rows]
    cause: BaseException | None = None
    try:
        answer = worker.call(lambda: _call(reward, arguments, columns, batch.phrases is not None), timeout)
    except Hung as error:
        return [Failure(tuple(rows), str(error), error)]
    except BaseException as error:
        problem, cause = _message(error), error
    else:
        if isinstance(answer, Tensor):
            found: list[Failure] = []
            for row, values, count in zip(rows, answer, columns, strict=True):
                bad = values[:count][~values[:count].isfinite()]
                if len(bad):
                    found.append(Failure((row,), f"returned {float(bad[0])}"))
                else:
                    scores[row, :count] = values[:count]
            return found
        problem = answer
    if len(rows) == 1:
        return [Failure((rows[0],), problem, cause)]
    failures: list[Failure] = []
    for row in rows:
        failures += _score_rows(reward, batch, [row], scores, worker, timeout, stop)
        if stop and _lost(failures):
            break
    return failures or [Failure((), problem, cause)]


def _message(error: BaseException) -> str:
    try:
        return redact(f"{type(error).__name__}: {error}")
    except Exception:  # an exception whose __str__ fails
        return type(error).__name__


def _lost(failures: list[Failure]) -> bool:
    return any(failure.rows for failure in failures)


def _call(
    reward: Reward, arguments: tuple[Tensor, list[str], list[Metadata]], columns: list[int], by_phrase: bool
) -> Tensor | str:
    """Scores on the CPU, ``[N, 1 + G]``, or what is wrong with the result.

    The copy to the CPU is part of the call, so that the timeout includes waiting for a GPU.
    """
    count = len(arguments[1])
    if not by_phrase:
        answer = reward(*arguments)
        return problem_with(answer, count) or as_scores(answer)[:, None]
    assert isinstance(reward, PhraseReward)
    answer, phrases = reward.by_phrase(*arguments)
    problem = problem_with(answer, count) or _problem_with_phrases(phrases, answer, [n - 1 for n in columns])
    return problem or torch.cat([as_scores(answer)[:, None], as_scores(phrases)], dim=1)


def _problem_with_phrases(phrases: object, scores: Tensor, counts: list[int]) -> str | None:
    """What is wrong with the scores of prompts with ``counts`` phrases, or None; unscored samples are ignored."""
    if not isinstance(phrases, Tensor) or phrases.ndim != 2 or len(phrases) != len(counts) or phrases.is_complex():
        got = f"a tensor {list(phrases.shape)} of {phrases.dtype}" if isinstance(phrases, Tensor) else type(phrases)
        return f"returned {got} for phrases, expected real numbers [{len(counts)}, G]"
    for scored, lost, count in zip((~phrases.isnan()).tolist(), scores.isnan().tolist(), counts, strict=True):
        if not lost and scored != [True] * count + [False] * (len(scored) - count):
            return f"scored {sum(scored)} phrases, expected the {count} of the prompt's core content, then NaN"
    return None


def shorten(prompt: str, length: int = 80) -> str:
    """The beginning of a prompt, for messages."""
    return prompt if len(prompt) <= length else prompt[: length - 3] + "..."
