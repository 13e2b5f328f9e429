"""studies.allocations: the weights of every allocation, and their agreement with star-train."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from star_trainer.config import Config
from star_trainer.policy import Policy
from star_trainer.prompts import Prompt, load_prompts
from star_trainer.scenes import Item, Scene, check, draw
from studies import agreement, allocations

BY_SHARES = ("split", "split, shuffled", "split, inverted")
MEANS_OF_ONE = ("means of one", "means of one, preset blocks", "means of one, shuffled", "means of one, inverted")


def fields(rollout: allocations.Rollout, config: Config) -> allocations.Fields:
    verdicts = check(rollout.batch.images, [p.metadata for p in rollout.batch.prompts])
    graded = verdicts.graded + 0.01 * torch.arange(6)
    phrases = verdicts.phrases + 0.01 * torch.arange(6)[:, None]
    return allocations.fields(rollout, agreement.credit(graded, phrases, config), 0, [1])


def test_every_allocation_has_weights_of_mean_one(rollout: allocations.Rollout, config: Config) -> None:
    found = fields(rollout, config)
    for name, terms in found.items():
        for advantages, weights in terms:
            assert advantages.shape == (6,)
            assert weights.shape == (6, 3, 64)
            assert weights.min() >= 0
            if name not in (*BY_SHARES, *allocations.ORACLES[1:]) or weights is terms[0][1]:
                torch.testing.assert_close(weights.mean(dim=(1, 2)), torch.ones(6), msg=name)
    assert {*found} == {name for name in allocations.names(2) if not name.startswith("strength")}


def test_each_control_changes_the_core_weights_as_its_name_says(rollout: allocations.Rollout, config: Config) -> None:
    found = {name: terms[0] for name, terms in fields(rollout, config).items()}
    core, advantages = found["core"][1], found["core"][0]
    torch.testing.assert_close(found["shuffled"][1].sort(dim=2).values, core.sort(dim=2).values)
    assert not torch.equal(found["shuffled"][1], core)
    pair = torch.stack([found["inverted"][1].flatten(), core.flatten()])
    assert torch.corrcoef(pair)[0, 1] < -0.5
    assert torch.equal(found["another rollout's"][1][0], core[1])
    assert torch.equal(found["frozen"][1][:, 0], found["frozen"][1][:, 2])
    permuted = found["permuted advantages"][0].view(3, 2)
    torch.testing.assert_close(permuted.sort(dim=1).values, advantages.view(3, 2).sort(dim=1).values)
    assert found["cap 2"][1].max() <= 2 + 1e-5
    torch.testing.assert_close(found["core, preset blocks"][1], found["block 1"][1])
    assert not torch.equal(found["core, preset blocks"][1], core)


def test_weights_over_steps_are_proportional_to_their_signals(rollout: allocations.Rollout, config: Config) -> None:
    n, _, blocks, _, p = rollout.phrases.shape
    even, point = torch.ones(p), torch.zeros(p).index_fill(0, torch.tensor(3), 1.0)
    maps = torch.stack([even, point, even + 20 * point])  # one for each step
    then = torch.stack([point, point, even])
    phrases = maps[None, :, None, None].expand(n, -1, blocks, 1, -1)
    made = replace(rollout, phrases=phrases, following=then[None, :, None].expand(n, -1, blocks, -1))
    found = {name: terms[0][1] for name, terms in fields(made, config).items() if name.startswith("steps by")}
    assert all((w == w[:, :, :1]).all() for w in found.values())
    contrast, change, noise = (found[f"steps by {name}"][0, :, 0] for name in ("contrast", "change", "noise"))
    assert contrast[0] < 1e-4 < contrast[2] < contrast[1]
    moved = torch.tensor([63 / 64, 0, 21 / 84 - 1 / 64])  # share of the map that moves to other positions
    torch.testing.assert_close(change, moved / moved.mean())
    torch.testing.assert_close(noise, rollout.noise / rollout.noise.mean())
    schedule = Policy(config, torch.device("cpu")).schedule(config.rollout.steps)
    stds = [schedule.transition(s.number, config, 1, torch.device("cpu")).std for s in rollout.batch.steps]
    torch.testing.assert_close(rollout.noise, torch.cat(stds))


@pytest.mark.parametrize("names", [BY_SHARES, MEANS_OF_ONE], ids=lambda names: names[0])
def test_split_keeps_the_sum_of_the_advantages_and_its_controls_only_move_weights(
    names: tuple[str, ...], rollout: allocations.Rollout, config: Config
) -> None:
    found = fields(rollout, config)
    split, (moved_terms, inverted) = found[names[0]], (found[name] for name in names[-2:])
    for name in names:
        total = torch.stack([advantages for advantages, _ in found[name]]).sum(dim=0)
        torch.testing.assert_close(total, found["scalar"][0][0], msg=name)
        for (mine, _), (own, _) in zip(found[name], split, strict=True):
            torch.testing.assert_close(mine, own)
        if names is MEANS_OF_ONE:
            assert torch.equal(found[name][0][1], torch.ones(6, 3, 64))
    assert any(part.abs().max() > 0.1 for part, _ in split[1:])
    whole = slice(0, 1) if names is BY_SHARES else slice(1, None)  # the terms with inverted weights
    for (_, own), (_, left) in zip(split[whole], inverted[whole], strict=True):
        present = own.std(dim=(1, 2)) > 0  # the prompt has the phrase
        assert torch.corrcoef(torch.stack([left[present].flatten(), own[present].flatten()]))[0, 1] < -0.5
    for (_, own), (_, moved) in zip(split[1:], moved_terms[1:], strict=True):
        torch.testing.assert_close(moved.sort(dim=2).values, own.sort(dim=2).values)
        present = own.std(dim=(1, 2)) > 0
        assert not torch.equal(moved[present], own[present])


def test_the_weights_of_the_phrases_of_split_add_up_to_the_core_weights(
    rollout: allocations.Rollout, config: Config
) -> None:
    found = fields(rollout, config)
    (_, whole), *parts = found["split"]
    torch.testing.assert_close(whole, found["core, preset blocks"][0][1])
    torch.testing.assert_close(torch.stack([weights for _, weights in parts]).sum(dim=0), whole)
    where = torch.stack([weights for _, weights in found["split, shuffled"][1:]]).sum(dim=0)
    torch.testing.assert_close(where, found["split, shuffled"][0][1])  # all terms have the same permutation


@pytest.mark.exhaustive
def test_core_weights_equal_those_of_star_train(rollout: allocations.Rollout, config: Config) -> None:
    from star_trainer import rollout as trainer

    policy = Policy(config, torch.device("cpu"))
    prompts = [prompt for prompt in load_prompts("scenes:composition")[:3] for _ in range(2)]
    batch = trainer.roll_out(policy, prompts, range(6), config, 0, Accelerator(cpu=True).autocast)
    core = allocations.allocate(rollout.phrases.sum(dim=3).mean(dim=2), layout="bsp")
    for at, step in enumerate(batch.steps):
        assert step.weights is not None
        torch.testing.assert_close(step.weights.flatten(1), core[:, at], rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("trained", [None, 2], ids=["all steps", "two of three"])
def test_weights_by_change_equal_those_of_star_train(config: Config, trained: int | None) -> None:
    from star_trainer import rollout as trainer

    config = replace(config, allocation=replace(config.allocation, over="total_variation"))
    config = replace(config, train=replace(config.train, steps=trained))
    policy, autocast = Policy(config, torch.device("cpu")), Accelerator(cpu=True).autocast
    prompts = load_prompts("scenes:composition")[:3]
    batch = trainer.roll_out(policy, [p for p in prompts for _ in range(2)], range(6), config, 0, autocast)
    rollout = allocations.roll_out(policy, prompts, config, 0, autocast)
    zeros = torch.zeros(6), torch.zeros(6, 3), torch.zeros(6, 3)
    ((_, expected),) = allocations.fields(rollout, zeros, 0, [0, 1])["core, by change"]
    assert len(batch.steps) == (trained or 3)
    found = torch.stack([step.weights.flatten(1) for step in batch.steps if step.weights is not None], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert float((found.mean(dim=2) - 1).abs().max()) > 0.01


@pytest.mark.exhaustive
def test_split_equals_that_of_star_train(config: Config) -> None:
    from star_trainer import rollout as trainer
    from star_trainer.credit import advantages_of, advantages_per_map
    from star_trainer.rewards.base import Scores

    config = replace(config, allocation=replace(config.allocation, credit="split", blocks=[1]))
    policy, autocast = Policy(config, torch.device("cpu")), Accelerator(cpu=True).autocast
    prompts = load_prompts("scenes:composition")[:3]
    batch = trainer.roll_out(policy, [p for p in prompts for _ in range(2)], range(6), config, 0, autocast)
    rollout = allocations.roll_out(policy, prompts, config, 0, autocast)
    graded = torch.tensor([0.1, 0.5, 0.3, 0.4, 0.9, 0.2])
    generator = torch.Generator().manual_seed(0)
    phrases = graded[:, None] * torch.rand(6, rollout.phrases.shape[3], generator=generator)
    credit = agreement.credit(graded, phrases, config)
    terms = allocations.fields(rollout, credit, 0, [1])["split"]
    assert batch.shares is not None
    own = advantages_of(Scores(graded, {}, phrases), config).values
    advantages = advantages_per_map(own, batch.shares, config.allocation, 5.0)
    for at, step in enumerate(batch.steps):
        assert step.weights is not None
        expected = (advantages[:, :, None] * step.weights.flatten(2)).sum(dim=1)
        found = sum(part[:, None] * weights[:, at] for part, weights in terms)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_object_mask_covers_the_object(rollout: allocations.Rollout) -> None:
    scene = Scene("", {}, (Item("square", "red", 7, 7, 3), Item("square", "blue", 24, 24, 7)), None, 0.95)
    red = {"include": [{"class": "square", "count": 1, "color": "red"}]}
    batch = replace(rollout.batch, images=draw(scene)[None], prompts=[Prompt("a red square", red)])
    mask = allocations.object_mask(batch).view(8, 8)
    assert mask[1, 1] > 0.7
    assert mask[5:, 5:].max() < 0.1


def test_parts_by_masks_of_the_finished_image(rollout: allocations.Rollout) -> None:
    """A part acts on its own object, or off all other objects; a part without an object acts everywhere."""
    scene = Scene("", {}, (Item("square", "red", 7, 7, 7), Item("square", "blue", 24, 24, 7)), None, 0.95)
    asked = [{"class": "square", "count": 1, "color": color} for color in ("red", "blue", "green")]
    images, prompts = draw(scene)[None].expand(6, -1, -1, -1), [Prompt("", {"include": asked})] * 6
    rollout = replace(rollout, batch=replace(rollout.batch, images=images, prompts=prompts))
    parts = torch.tensor([1.0, 20.0, 300.0]).expand(6, 3)
    found = allocations.fields(rollout, (torch.full((6,), 4321.0), parts, parts), 0, [0])
    for name, on_red, on_blue, off in (
        ("parts on own objects", 4301, 4320, 4300),
        ("parts off other objects", 4301, 4320, 4321),
    ):
        terms = found[f"{name} (oracle)"]
        total = sum(part[:, None, None] * weights for part, weights in terms)[0, 0].view(8, 8)
        assert [round(float(total[at])) for at in ((1, 1), (6, 6), (0, 7))] == [on_red, on_blue, off]
