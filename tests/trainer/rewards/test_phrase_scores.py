"""Scores of phrases: they are summed as scores of samples, and a reward that scores other phrases fails."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from brightness import PROMPTS, Brightness, submit
from torch import Tensor

from star_trainer.rewards import Pending, RewardError, RewardService, WeightedSum


class ByPhrase(Brightness):
    """A reward with given scores of phrases, one row for each of PROMPTS."""

    def __init__(self, phrases: Tensor, name: str = "phrases") -> None:
        super().__init__(name=name)
        self.phrases = phrases

    def by_phrase(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[object]) -> tuple[Tensor, Tensor]:
        rows = [PROMPTS.index(prompt) for prompt in prompts]
        return self(images, prompts, metadata), self.phrases[rows]


COUNTS = [2, 1, 3, 1]
PHRASES = torch.arange(16.0).view(4, 4).masked_fill(torch.arange(4) >= torch.tensor(COUNTS)[:, None], torch.nan)


def submit_phrases(service: RewardService, images: Tensor) -> Pending:
    return service.submit(images, PROMPTS, [{}] * 4, indices=range(10, 14), phrases=COUNTS)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_scores_of_phrases_have_the_same_weighted_sum(images: Tensor, batch_size: int | None) -> None:
    parts = {"one": ByPhrase(PHRASES), "other": ByPhrase(PHRASES**2), "shown": Brightness()}
    total = WeightedSum(parts, {"one": 2.0, "other": -0.5, "shown": 0.0})
    with RewardService(total, batch_size=batch_size) as service:
        scores = submit_phrases(service, images).result()
        assert submit(service, images).result().phrases is None
    assert scores.phrases is not None
    torch.testing.assert_close(scores.phrases, (2 * PHRASES - 0.5 * PHRASES**2)[:, :3], equal_nan=True)
    assert torch.allclose(scores.total, 1.5 * images.mean((1, 2, 3)))
    assert torch.equal(scores.parts["shown"], images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (1, [4.0, 1.0, torch.nan, torch.nan], "scored 2 phrases, expected the 1 of the prompt"),
        (0, [torch.nan, 0.0, torch.nan, torch.nan], "scored 1 phrases, expected the 2 of the prompt"),
        (0, [torch.nan, 0.0, 1.0, torch.nan], "scored 2 phrases, expected the 2 of the prompt"),
        (2, [0.0, torch.inf, 1.0, torch.nan], "returned inf"),
    ],
)
def test_only_the_sample_with_other_phrases_fails(images: Tensor, row: int, change: list[float], message: str) -> None:
    wrong = PHRASES.clone()
    wrong[row] = torch.tensor(change)
    with RewardService(ByPhrase(wrong)) as service, pytest.raises(RewardError, match=f"sample {10 + row} .*{message}"):
        submit_phrases(service, images).result()
    with RewardService(ByPhrase(wrong), on_failure="skip") as service, pytest.warns(RuntimeWarning, match=message):
        scores = submit_phrases(service, images).result()
    others = [n for n in range(4) if n != row]
    assert scores.phrases is not None
    assert bool(scores.phrases[row].isnan().all())
    assert bool(scores.total[row].isnan())
    torch.testing.assert_close(scores.phrases[others], PHRASES[others, :3], equal_nan=True)
    assert torch.equal(scores.total[others], images.mean((1, 2, 3))[others])


@pytest.mark.parametrize("answer", [torch.zeros(4), torch.zeros(3, 2), [[0.0]]], ids=["row", "rows", "list"])
def test_scores_of_phrases_have_one_row_per_sample(images: Tensor, answer: object) -> None:
    reward = ByPhrase(PHRASES)
    reward.by_phrase = lambda images, *_: (images.mean((1, 2, 3)), answer)  # type: ignore[method-assign, return-value]
    with RewardService(reward) as service, pytest.raises(RewardError, match=r"for phrases, expected real numbers \["):
        submit_phrases(service, images).result()
