"""Scores one batch by one reward, and finds the samples that it fails on."""

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

_NAMED = 4  # samples that a message names by their prompts


@dataclass(frozen=True)
class Batch:
    """Images with their prompts and metadata; ``indices`` are the caller's own numbers for them.

    ``phrases`` says how many each prompt has, where they are to be scored as well.
    """

    images: Tensor
    prompts: list[str]
    metadata: list[Metadata]
    indices: list[int]
    phrases: list[int] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, rows: Sequence[int]) -> tuple[Tensor, list[str], list[Metadata]]:
        """The arguments of a reward for some rows: copies, which it may change."""
        prompts, metadata = [self.prompts[row] for row in rows], [copied(self.metadata[row]) for row in rows]
        return self.images[list(rows)], prompts, metadata

    def columns(self, row: int) -> int:
        """How many numbers a row needs: its score, and one for each of its phrases."""
        return 1 + (self.phrases[row] if self.phrases else 0)

    def describe(self, row: int) -> str:
        """Names a sample in a message: its index and its prompt."""
        return f"sample {self.indices[row]} ({shorten(self.prompts[row])!r})"


@dataclass(frozen=True)
class Failure:
    """Why a reward gave no score to some rows of a batch; no rows: why a call for several was made again one by one."""

    rows: tuple[int, ...]
    cause: str
    error: BaseException | None = None

    def describe(self, reward: str, batch: Batch) -> str:
        """The message for people: the reward, the samples, the cause."""
        named = ", ".join(map(batch.describe, self.rows[:_NAMED]))
        more = ", ".join(str(batch.indices[row]) for row in self.rows[_NAMED:])
        return f"reward {reward!r} failed on {named}{f' and samples {more}' if more else ''}: {self.cause}"

    def notes(self, reward: str, batch: Batch) -> list[str]:
        """What to warn of when the samples are skipped: each of them once."""
        if not self.rows:
            return [f"reward {reward!r} failed on several samples at once, and on none of them alone: {self.cause}"]
        alone = [Failure((row,), self.cause) for row in self.rows]
        return [f"{failure.describe(reward, batch)}; the sample is skipped" for failure in alone]


def score(
    reward: Reward, batch: Batch, worker: Worker, *, timeout: float, batch_size: int | None, stop: bool
) -> tuple[Tensor, list[Failure]]:
    """The scores of a batch, and what failed.

    A call for several samples that raises, or returns something else than one number a sample, is made again for each
    of them alone. A call that hangs is not: its samples fail together.

    Args:
        timeout: seconds that one call may take.
        batch_size: the most samples a call is given; None is all of them.
        stop: whether to return at the first failure, with the rows after it not scored.

    Returns:
        float32 ``[N, 1 + G]``, the score and those of phrases, NaN where there is no finite one, and the failures.
    """
    scores = torch.full((len(batch), max(map(batch.columns, range(len(batch))), default=1)), math.nan)
    failures = [
        Failure((row,), "the image holds NaN or infinity")
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
    """Fills ``scores`` at ``rows``; returns what failed there."""
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
    except Exception:  # of a reward's own class, whose __str__ fails
        return type(error).__name__


def _lost(failures: list[Failure]) -> bool:
    return any(failure.rows for failure in failures)


def _call(
    reward: Reward, arguments: tuple[Tensor, list[str], list[Metadata]], columns: list[int], by_phrase: bool
) -> Tensor | str:
    """Scores on the CPU, ``[N, 1 + G]``, or what is wrong with the answer.

    Copied here, so that a wait for a GPU counts as the call.
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
    """What is wrong with scores of phrases for prompts that have ``counts``, or None; samples without a score pass."""
    if not isinstance(phrases, Tensor) or phrases.ndim != 2 or len(phrases) != len(counts) or phrases.is_complex():
        got = f"a tensor {list(phrases.shape)} of {phrases.dtype}" if isinstance(phrases, Tensor) else type(phrases)
        return f"returned {got} for phrases, expected real numbers [{len(counts)}, G]"
    for scored, lost, count in zip((~phrases.isnan()).tolist(), scores.isnan().tolist(), counts, strict=True):
        if not lost and scored != [True] * count + [False] * (len(scored) - count):
            return f"scored {sum(scored)} phrases, expected the {count} of the prompt's core content, first in the row"
    return None


def shorten(prompt: str, length: int = 80) -> str:
    """The prompt's beginning, for messages."""
    return prompt if len(prompt) <= length else prompt[: length - 3] + "..."
