"""Credit by phrase: weights from the maps of phrases, advantages of phrases, and how the update combines them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from tiers import mostly_exhaustive
from torch import Tensor

from star_kernels import TokenSelection
from star_kernels.prompts import core_content
from star_trainer import record, rollout
from star_trainer.config import Allocation, Config, Output
from star_trainer.credit import advantages_per_map, phrase_shares, select
from star_trainer.prompts import Prompt
from star_trainer.rewards.base import RewardError
from star_trainer.samples import Batch
from star_trainer.scenes import check, describe
from star_trainer.scenes.describe import Thing
from star_trainer.trainer import Trainer

CHANNELS = "rewards_that_fail:Channels"
PAIR = Prompt(*describe([Thing("square", "blue"), Thing("circle", "red")], "left of"))
SINGLE = Prompt(*describe([Thing("ring", "green")]))


@pytest.fixture
def by_phrase(configure: Callable[..., Config]) -> Callable[..., Config]:
    def make(**parts: dict[str, Any]) -> Config:
        allocation = {"credit": "phrase", **parts.pop("allocation", {})}
        reward = {"weights": {"scene": 1.0}, **parts.pop("reward", {})}
        data = {"prompts": "scenes:composition", **parts.pop("data", {})}
        return configure(allocation=allocation, reward=reward, data=data, **parts)

    return make


def rolled_out(trainer: Trainer, config: Config, prompts: list[Prompt]) -> Batch:
    numbers = range(len(prompts))
    return rollout.roll_out(trainer.policy, prompts, numbers, config, 0, trainer.accelerator.autocast)


def gradient(trainer: Trainer, batch: Batch, advantages: Tensor) -> Tensor:
    trainer.optimizer.zero_grad()
    trainer.updater.gradients([batch], advantages)
    return torch.cat([p.grad.flatten().clone() for p in trainer.policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "method",
    mostly_exhaustive([{}, {"over": "trajectory"}, {"over": "total_variation"}, {"strength": 0.5, "cap": 2.0}], [{}]),
    ids=str,
)
def test_each_phrase_has_the_weights_of_its_own_map(
    by_phrase: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    method: dict[str, Any],
) -> None:
    config = by_phrase(allocation=method)
    trainer = trainer_of(config)
    batch = rolled_out(trainer, config, [PAIR, SINGLE])
    assert batch.shares is not None
    torch.testing.assert_close(batch.shares, torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1, 0, 0]]))
    weights = torch.stack([step.weights for step in batch.steps if step.weights is not None], dim=1)
    assert torch.equal(weights[1, :, 1:], torch.ones_like(weights[1, :, 1:]))  # phrases that the prompt does not have
    image = replace(config, allocation=replace(config.allocation, credit="image"))
    for place, name in enumerate(PAIR.core.names):
        only = replace(PAIR, core_source=[name])
        alone = torch.stack([s.weights for s in rolled_out(trainer, image, [only, SINGLE]).steps], dim=1)
        torch.testing.assert_close(weights[0, :, place], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[1, :, 0], alone[1], rtol=1e-4, atol=1e-5)
    assert float((weights[0, :, 0] - weights[0, :, 1]).abs().max()) > 1e-3


@pytest.mark.parametrize("ratio", ["sample", "location"])
def test_the_gradient_is_the_mean_over_phrases(
    by_phrase: Callable[..., Config], trainer_of: Callable[[Config], Trainer], ratio: str
) -> None:
    config = by_phrase(train={"ratio": ratio, "advantage_clip": 1.0, "batch": 1})
    trainer = trainer_of(config)
    batch = rolled_out(trainer, config, [PAIR, SINGLE])
    advantages = torch.tensor([[0.9, -0.6, 3.0, 0.0], [0.7, 0.0, 0.0, 0.0]])  # four phrases in another batch
    found = gradient(trainer, batch, advantages)
    expected = torch.zeros_like(found)
    counts = torch.tensor([3.0, 1.0])
    for phrase in range(3):
        steps = [replace(s, weights=s.weights[:, phrase]) for s in batch.steps if s.weights is not None]
        own = advantages[:, phrase].clamp(-1, 1) / counts
        expected += gradient(trainer, replace(batch, steps=steps, shares=None), own)
    assert float(expected.norm()) > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    advantages[1, 1:], advantages[0, 3] = 5.0, 5.0  # columns that belong to no phrase
    assert torch.equal(gradient(trainer, batch, advantages), found)


def test_a_prompt_of_one_phrase_is_trained_as_with_credit_by_image(
    by_phrase: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    written = {}
    for credit in ("image", "phrase"):
        config = by_phrase(
            data={"prompts": "scenes:text"},
            allocation={"credit": credit},
            reward={"weights": {"rewards_that_fail:Whole": 1.0}},
            rollout={"group_size": 4},
            train={"epochs": 2, "updates": 2, "kl_coef": 0.01},
            output={"folder": str(tmp_path / credit)},
        )
        trainer_of(config).run()
        written[credit] = (tmp_path / credit / "checkpoint-000002" / "weights.safetensors").read_bytes()
    assert written["image"] == written["phrase"]


def test_the_advantages_of_an_epoch_are_those_of_each_phrase(
    by_phrase: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in batches that mix groups, and prompts of one and of three phrases."""
    config = by_phrase(rollout={"groups": 4, "group_size": 3, "batch": 4}, reward={"weights": {CHANNELS: 2.0}})
    trainer = trainer_of(config)
    trainer.prompts = [PAIR, SINGLE]
    given: list[tuple[Any, Tensor]] = []
    step = trainer.updater.step
    monkeypatch.setattr(trainer.updater, "step", lambda b, a, r: (given.append((b, a)), step(b, a, r))[1])
    metrics = trainer.train_epoch()
    (batches, advantages), *_ = given
    judge = trainer.rewards.reward.rewards["channels"]
    counts = set()
    for batch in batches:
        _, phrases = judge.by_phrase(batch.images, [p.text for p in batch.prompts], [p.metadata for p in batch.prompts])
        for number, scores, prompt in zip(batch.numbers, phrases, batch.prompts, strict=True):
            count = int(scores.isfinite().sum())
            counts.add(count)
            assert count == len(core_content(prompt.text, metadata=prompt.metadata).phrases)
            assert bool((advantages[number, :count] != 0).all())
            assert not advantages[number, count:].any()
    assert advantages.shape == (12, max(counts))
    assert counts == {1, 3}
    grouped = advantages.view(4, 3, -1)
    torch.testing.assert_close(grouped.sum(dim=1), torch.zeros_like(grouped[:, 0]), rtol=0, atol=1e-4)
    assert all(torch.tensor(value).isfinite() for value in metrics.values())
    assert metrics["flat_groups"] == 0


def test_a_run_with_the_reward_scene_writes_figures_of_its_weights(
    by_phrase: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    config = by_phrase(train={"kl_coef": 0.1}, evaluation={"every": 1}, output={"images_every": 1})
    trainer = trainer_of(config)
    trainer.run()
    assert (tmp_path / "run" / "allocation-000001-0.png").is_file()


def test_a_reward_that_scores_other_phrases_stops_the_run(
    by_phrase: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    reward = {"weights": {CHANNELS: 1.0}, "options": {CHANNELS: {"more": 1}}}
    with pytest.raises(
        RewardError, match=r"'channels' failed on sample .*scored \d phrases, expected the \d of the prompt"
    ):
        trainer_of(by_phrase(reward=reward)).run()


def test_phrases_without_tokens_have_no_share() -> None:
    weight = torch.tensor([[[1.0, 1, 0], [0, 0, 0], [0, 0, 1]], [[0.0] * 3] * 3])
    selection = TokenSelection(torch.tensor([[3, 4, 5], [1, 2, -1]], dtype=torch.int32), weight)
    assert phrase_shares(selection, Allocation(credit="phrase")).tolist() == [[0.5, 0.0, 0.5], [0.0] * 3]
    assert phrase_shares(selection, Allocation(credit="split")).tolist() == [[1.0, 0.0, 1.0], [0.0] * 3]


def test_a_split_advantage_keeps_its_sum() -> None:
    """The parts of phrases without tokens, or that only prompts of other batches have, go to the first column."""
    advantages = torch.tensor([[1.0, 0.25, 0.5, -0.75, 7.0], [-2.0, 3.0, 0.0, 0.0, 0.0]])
    shares = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    found = advantages_per_map(advantages, shares, Allocation(credit="split"), limit=1.0)
    assert found.tolist() == [[1.5, 0.25, 0.0, -0.75], [-5.0, 3.0, 0.0, 0.0]]
    assert torch.equal(found.sum(dim=1), advantages[:, 0])


@pytest.mark.parametrize("ratio", mostly_exhaustive(["sample", "location"], ["location"]))
def test_a_split_advantage_at_uniform_weights_is_flow_grpos(
    by_phrase: Callable[..., Config], trainer_of: Callable[[Config], Trainer], ratio: str
) -> None:
    """In the first update, in which all ratios are one and none is clipped."""
    parts = {"train": {"ratio": ratio}, "reward": {"weights": {CHANNELS: 1.0}}}
    split = by_phrase(allocation={"credit": "split", "strength": 0.0}, **parts)
    plain = by_phrase(allocation={"credit": "image", "method": "plain"}, **parts)
    trainer = trainer_of(plain)
    expected = gradient(trainer, rolled_out(trainer, plain, [PAIR, SINGLE]), torch.tensor([0.8, -1.2]))
    trainer = trainer_of(split)
    advantages = torch.tensor([[0.8, 0.9, -0.3, 2.0], [-1.2, 0.7, 0.0, 0.0]])
    found = gradient(trainer, rolled_out(trainer, split, [PAIR, SINGLE]), advantages)
    assert float(expected.norm()) > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "method",
    mostly_exhaustive(
        [{}, {"over": "trajectory"}, {"over": "total_variation"}, {"cap": 2.0}, {"strength": 0.5}], [{"cap": 2.0}]
    ),
    ids=str,
)
def test_credit_split_uses_the_map_of_all_phrases_and_the_shares_of_each_phrase(
    by_phrase: Callable[..., Config], trainer_of: Callable[[Config], Trainer], method: dict[str, Any]
) -> None:
    found, image, phrase = (
        rolled_out(trainer_of(config), config, [PAIR, SINGLE])
        for config in (by_phrase(allocation={**method, "credit": c}) for c in ("split", "image", "phrase"))
    )
    for step, whole, own in zip(found.steps, image.steps, phrase.steps, strict=True):
        assert step.weights is not None
        assert whole.weights is not None
        assert own.weights is not None
        torch.testing.assert_close(step.weights[:, 0], whole.weights, rtol=1e-4, atol=1e-5)
        if "strength" in method:
            continue
        parts = step.weights[:, 1:]
        torch.testing.assert_close(parts.sum(dim=1), step.weights[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts[1, 0], step.weights[1, 0])  # the prompt's only phrase
        if not method:
            means = parts[0].mean(dim=(1, 2), keepdim=True)
            torch.testing.assert_close(parts[0] / means, own.weights[0], rtol=1e-4, atol=1e-5)


def test_a_run_with_credit_split_writes_figures_of_its_weights(
    by_phrase: Callable[..., Config], trainer_of: Callable[[Config], Trainer], tmp_path: Path
) -> None:
    trainer_of(by_phrase(allocation={"credit": "split"}, output={"images_every": 1})).run()
    assert (tmp_path / "run" / "allocation-000001-0.png").is_file()


@pytest.mark.parametrize("credit", ["phrase", "split"])
def test_figures_show_the_weights_of_all_phrases_together(
    by_phrase: Callable[..., Config],
    trainer_of: Callable[[Config], Trainer],
    monkeypatch: pytest.MonkeyPatch,
    credit: str,
) -> None:
    config = by_phrase(allocation={"credit": credit}, output={"images_every": 1})
    trainer = trainer_of(config)
    batch = rolled_out(trainer, config, [PAIR, SINGLE])
    drawn: list[Tensor] = []

    def weights(values: Tensor, **_: Any) -> Figure:
        drawn.append(values)
        return Figure()

    monkeypatch.setattr(record.figures, "weights", weights)
    alone = replace(config, rollout=replace(config.rollout, group_size=1))
    record.Record(alone, enabled=True).allocation(1, batch, torch.zeros(2))
    maps = torch.stack([*(step.weights for step in batch.steps if step.weights is not None), batch.shown[2]])
    torch.testing.assert_close(drawn[0], maps[:, 0, 0] if credit == "split" else maps[:, 0].mean(dim=1))
    torch.testing.assert_close(drawn[1], maps[:, 1, 0])


def test_figures_show_the_best_sample_of_each_prompt_in_trained_middle_and_last_steps(
    configure: Callable[..., Config], trainer_of: Callable[[Config], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(output={"images_every": 1}, rollout={"steps": 8, "window": 2, "window_end": 2})
    trainer = trainer_of(config)
    batch = rolled_out(trainer, config, [PAIR, PAIR, SINGLE, SINGLE])
    assert sorted(batch.shown) == [4, 7]
    drawn: list[tuple[Tensor, list[str], str]] = []

    def weights(values: Tensor, *, image: Tensor, labels: list[str], title: str) -> Figure:
        drawn.append((values, labels, title))
        return Figure()

    monkeypatch.setattr(record.figures, "weights", weights)
    record.Record(config, enabled=True).allocation(1, batch, torch.tensor([0.2, 0.9, 0.7, torch.nan]))
    for (values, labels, title), row, text in zip(
        drawn, (1, 2), (f"{PAIR.text} (reward 0.90)", f"{SINGLE.text} (reward 0.70)"), strict=True
    ):
        assert title == text
        assert labels == ["step 0 (trained)", "step 1 (trained)", "step 4", "step 7"]
        trained = [step.weights[row] for step in batch.steps if step.weights is not None]
        torch.testing.assert_close(values, torch.stack([*trained, batch.shown[4][row], batch.shown[7][row]]))
        torch.testing.assert_close(values.mean(dim=(1, 2)), torch.ones(4))
    later = rollout.roll_out(trainer.policy, [PAIR], [0], replace(config, output=Output()), 1, nullcontext)
    assert not later.shown  # no figures after this epoch
    config.allocation.over = "trajectory"
    assert not rolled_out(trainer, config, [PAIR]).shown  # the weights of a step depend on the other trained steps


def test_a_prompt_whose_phrases_are_all_truncated_has_no_share(
    by_phrase: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    config = by_phrase()
    trainer = trainer_of(config)
    long = Prompt("and " * 100 + PAIR.text, PAIR.metadata)
    with pytest.warns(UserWarning, match="truncated in every region"):
        selection = select(trainer.policy, [long, PAIR], Allocation(credit="phrase"))
    shares = phrase_shares(selection, config.allocation)
    assert shares[0].tolist() == [0.0] * 3
    torch.testing.assert_close(shares[1], torch.full((3,), 1 / 3))


def test_phrases_of_the_reward_and_of_the_selection_have_the_same_order(
    by_phrase: Callable[..., Config], trainer_of: Callable[[Config], Trainer]
) -> None:
    """The tokens of each phrase, selected alone, equal those at the phrase's index."""
    config = by_phrase()
    trainer = trainer_of(config)
    both = select(trainer.policy, [PAIR], config.allocation)
    names = core_content(PAIR.text, metadata=PAIR.metadata).names
    assert names == ("blue square", "red circle", "left of")
    assert check(torch.zeros(1, 3, 32, 32), [PAIR.metadata]).phrases.shape == (1, both.phrases)
    for place, name in enumerate(names):
        only = Prompt(PAIR.text, {"include": [{"class": name}]})
        alone = select(trainer.policy, [only], config.allocation)
        chosen = both.index[0][both.weight[0, place] > 0]
        assert sorted(chosen.tolist()) == sorted(alone.index[0][alone.weight[0, 0] > 0].tolist())
