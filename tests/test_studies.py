"""The studies of the allocation: their weights are what their names say, and their statistics are right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import allocations
import gradient_agreement
import learning
import learning_parts
import pytest
import torch
import yaml
from accelerate import Accelerator

from star_trainer.command import parse as parse_settings
from star_trainer.config import Config
from star_trainer.policy import Policy
from star_trainer.prompts import Prompt, load_prompts
from star_trainer.scenes import Item, Scene, check, draw
from star_trainer.schedule import schedule_of

BY_SHARES = ("split", "split, shuffled", "split, inverted")
MEANS_OF_ONE = ("means of one", "means of one, preset blocks", "means of one, shuffled", "means of one, inverted")


@pytest.fixture(scope="module")
def config(pipeline_folder: Path) -> Config:
    made = Config()
    return replace(
        made,
        model=replace(made.model, path=str(pipeline_folder), text_length=1),
        rollout=replace(made.rollout, steps=4, groups=3, group_size=2, guidance=1.5),
    )


@pytest.fixture(scope="module")
def rollout(config: Config) -> allocations.Rollout:
    policy = Policy(config, torch.device("cpu"))
    prompts = load_prompts("scenes:composition")[:3]
    return allocations.roll_out(policy, prompts, config, 0, Accelerator(cpu=True).autocast)


def fields(rollout: allocations.Rollout, config: Config) -> allocations.Fields:
    verdicts = check(rollout.batch.images, [p.metadata for p in rollout.batch.prompts])
    graded = verdicts.graded + 0.01 * torch.arange(6)
    phrases = verdicts.phrases + 0.01 * torch.arange(6)[:, None]
    return allocations.fields(rollout, gradient_agreement.credit(graded, phrases, config), 0, [1])


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


def test_controls_are_what_their_names_say(rollout: allocations.Rollout, config: Config) -> None:
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


def test_weights_of_steps_follow_their_signals(rollout: allocations.Rollout, config: Config) -> None:
    n, _, blocks, _, p = rollout.phrases.shape
    even, point = torch.ones(p), torch.zeros(p).index_fill(0, torch.tensor(3), 1.0)
    maps = torch.stack([even, point, even + 20 * point])  # of the three steps
    then = torch.stack([point, point, even])
    phrases = maps[None, :, None, None].expand(n, -1, blocks, 1, -1)
    made = replace(rollout, phrases=phrases, following=then[None, :, None].expand(n, -1, blocks, -1))
    found = {name: terms[0][1] for name, terms in fields(made, config).items() if name.startswith("steps by")}
    assert all((w == w[:, :, :1]).all() for w in found.values())
    contrast, change, noise = (found[f"steps by {name}"][0, :, 0] for name in ("contrast", "change", "noise"))
    assert contrast[0] < 1e-4 < contrast[2] < contrast[1]
    moved = torch.tensor([63 / 64, 0, 21 / 84 - 1 / 64])  # the share of the map that is elsewhere
    torch.testing.assert_close(change, moved / moved.mean())
    torch.testing.assert_close(noise, rollout.noise / rollout.noise.mean())
    schedule = schedule_of(Policy(config, torch.device("cpu")).pipeline, config.rollout.steps)
    stds = [schedule.transition(s.number, config, 1, torch.device("cpu")).std for s in rollout.batch.steps]
    torch.testing.assert_close(rollout.noise, torch.cat(stds))


@pytest.mark.parametrize("names", [BY_SHARES, MEANS_OF_ONE], ids=lambda names: names[0])
def test_split_keeps_each_advantage_and_its_controls_only_move_it(
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
    whole = slice(0, 1) if names is BY_SHARES else slice(1, None)  # what is inverted
    for (_, own), (_, left) in zip(split[whole], inverted[whole], strict=True):
        there = own.std(dim=(1, 2)) > 0  # the phrases of a prompt
        assert torch.corrcoef(torch.stack([left[there].flatten(), own[there].flatten()]))[0, 1] < -0.5
    for (_, own), (_, moved) in zip(split[1:], moved_terms[1:], strict=True):
        torch.testing.assert_close(moved.sort(dim=2).values, own.sort(dim=2).values)
        there = own.std(dim=(1, 2)) > 0
        assert not torch.equal(moved[there], own[there])


def test_parts_by_shares_add_up_to_the_whole_map(rollout: allocations.Rollout, config: Config) -> None:
    found = fields(rollout, config)
    (_, whole), *parts = found["split"]
    torch.testing.assert_close(whole, found["core, preset blocks"][0][1])
    torch.testing.assert_close(torch.stack([weights for _, weights in parts]).sum(dim=0), whole)
    where = torch.stack([weights for _, weights in found["split, shuffled"][1:]]).sum(dim=0)
    torch.testing.assert_close(where, found["split, shuffled"][0][1])  # all parts move alike


@pytest.mark.exhaustive
def test_maps_are_those_of_the_driver(rollout: allocations.Rollout, config: Config) -> None:
    from star_trainer import rollout as driver

    policy = Policy(config, torch.device("cpu"))
    prompts = [prompt for prompt in load_prompts("scenes:composition")[:3] for _ in range(2)]
    batch = driver.roll_out(policy, prompts, range(6), config, 0, Accelerator(cpu=True).autocast)
    core = allocations.allocate(rollout.phrases.sum(dim=3).mean(dim=2), layout="bsp")
    for at, step in enumerate(batch.steps):
        assert step.weights is not None
        torch.testing.assert_close(step.weights.flatten(1), core[:, at], rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("trained", [None, 2], ids=["all steps", "two of three"])
def test_weights_by_change_are_those_of_the_driver(config: Config, trained: int | None) -> None:
    from star_trainer import rollout as driver

    config = replace(config, allocation=replace(config.allocation, over="change"))
    config = replace(config, train=replace(config.train, steps=trained))
    policy, autocast = Policy(config, torch.device("cpu")), Accelerator(cpu=True).autocast
    prompts = load_prompts("scenes:composition")[:3]
    batch = driver.roll_out(policy, [p for p in prompts for _ in range(2)], range(6), config, 0, autocast)
    rollout = allocations.roll_out(policy, prompts, config, 0, autocast)
    zeros = torch.zeros(6), torch.zeros(6, 3), torch.zeros(6, 3)
    ((_, expected),) = allocations.fields(rollout, zeros, 0, [0, 1])["core, by change"]
    assert len(batch.steps) == (trained or 3)
    found = torch.stack([step.weights.flatten(1) for step in batch.steps if step.weights is not None], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert float((found.mean(dim=2) - 1).abs().max()) > 0.01


@pytest.mark.exhaustive
def test_split_is_that_of_the_driver(config: Config) -> None:
    from star_trainer import rollout as driver
    from star_trainer.credit import acting, advantages_of
    from star_trainer.rewards.base import Scores

    config = replace(config, allocation=replace(config.allocation, credit="split", blocks=[1]))
    policy, autocast = Policy(config, torch.device("cpu")), Accelerator(cpu=True).autocast
    prompts = load_prompts("scenes:composition")[:3]
    batch = driver.roll_out(policy, [p for p in prompts for _ in range(2)], range(6), config, 0, autocast)
    rollout = allocations.roll_out(policy, prompts, config, 0, autocast)
    graded = torch.tensor([0.1, 0.5, 0.3, 0.4, 0.9, 0.2])
    generator = torch.Generator().manual_seed(0)
    phrases = graded[:, None] * torch.rand(6, rollout.phrases.shape[3], generator=generator)
    credit = gradient_agreement.credit(graded, phrases, config)
    terms = allocations.fields(rollout, credit, 0, [1])["split"]
    assert batch.shares is not None
    advantages = acting(advantages_of(Scores(graded, {}, phrases), config).values, batch.shares, config.allocation, 5.0)
    for at, step in enumerate(batch.steps):
        assert step.weights is not None
        expected = (advantages[:, :, None] * step.weights.flatten(2)).sum(dim=1)
        found = sum(part[:, None] * weights[:, at] for part, weights in terms)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_object_mask_lies_on_the_object(rollout: allocations.Rollout) -> None:
    scene = Scene("", {}, (Item("square", "red", 7, 7, 3), Item("square", "blue", 24, 24, 7)), None, 0.95)
    red = {"include": [{"class": "square", "count": 1, "color": "red"}]}
    batch = replace(rollout.batch, images=draw(scene)[None], prompts=[Prompt("a red square", red)])
    mask = allocations.object_mask(batch).view(8, 8)
    assert mask[1, 1] > 0.7
    assert mask[5:, 5:].max() < 0.1


def test_parts_by_masks_of_the_finished_picture(rollout: allocations.Rollout) -> None:
    """Each on its own object, or wherever no other one is; a part without an object acts everywhere."""
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


@pytest.mark.exhaustive
def test_gradients_are_those_of_the_driver(rollout: allocations.Rollout, config: Config) -> None:
    from star_trainer.trainer import Trainer

    plain = replace(config, allocation=replace(config.allocation, method="plain"), data=config.data)
    plain = replace(plain, output=replace(plain.output, tensorboard=False, folder=str(Path(config.model.path) / "run")))
    trainer = Trainer(plain, Accelerator(cpu=True), progress=False)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    trainer.updater.gradients([rollout.batch], advantages)
    parameters = list(trainer.policy.model.parameters())
    expected = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    found = gradient_agreement.gradients(
        trainer.policy, rollout.batch, {"scalar": [(advantages, torch.ones(6, 3, 64))]}, parameters, config
    )
    torch.testing.assert_close(found["scalar"] / 3, expected, rtol=1e-3, atol=1e-5)
    steps = [found[f"scalar, step {step.number}"] for step in rollout.batch.steps]
    torch.testing.assert_close(torch.stack(steps).sum(dim=0), found["scalar"])


@pytest.mark.exhaustive
def test_allocations_join_the_unit_of_the_same_batches(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reused = replace(
        config, allocation=replace(config.allocation, blocks=[1]), rollout=replace(config.rollout, groups=2)
    )
    monkeypatch.setattr(gradient_agreement, "settings", lambda options: reused)
    out = tmp_path / "out.json"
    command = ["--model", config.model.path, "--batches", "4", "--groups", "2", "--group-size", "2", "--out", str(out)]
    gradient_agreement.main([*command, "--arms", "core; strength 0.5"])
    (first,) = json.loads(out.read_text())["units"]
    gradient_agreement.main([*command, "--arms", "core; split, shuffled"])
    (unit,) = json.loads(out.read_text())["units"]
    names = {name for name in unit["agreement"] if ", step" not in name}
    assert names == {"scalar", "core", "strength 0.5", "split, shuffled"}
    assert {name: unit["agreement"][name] for name in first["agreement"]} == first["agreement"]
    monkeypatch.setattr(gradient_agreement, "measure", lambda *_: pytest.fail("all of it is there"))
    gradient_agreement.main([*command, "--arms", "core; scalar"])
    with pytest.raises(SystemExit, match=r"--arms must name some of scalar; core;.* got 'cores'"):
        gradient_agreement.main([*command, "--arms", "cores"])
    assert "split, shuffled, scaled" in capsys.readouterr().out


def test_agreement_is_the_mean_cosine_of_different_vectors() -> None:
    vectors = torch.randn(6, 500) + 0.5
    pairs = [torch.cosine_similarity(a, b, dim=0) for i, a in enumerate(vectors) for b in vectors[:i]]
    found = gradient_agreement.agreement(vectors)
    assert found["cosine"] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5)
    without = gradient_agreement.agreement(vectors[1:])["cosine"]
    assert found["without"][0] == pytest.approx(without, abs=1e-5)


def test_scaled_cosines_and_those_along_scalar() -> None:
    """An entry of huge gradients drowns all others, but not once each is divided by its root mean square."""
    noise, loud = torch.randn(2, 6, 400), torch.cat([torch.full((1,), 1e3), torch.ones(399)])
    scalar, other = (noise + 0.5) * loud
    found = gradient_agreement.compared(
        {
            "scalar": dict(enumerate(scalar)),
            "other": dict(enumerate(other)),
            "other, step 1": {n: other[n] for n in (5, 0, 2, 3)},  # of the batches that trained it
        }
    )
    rms = scalar.square().mean(dim=0).sqrt()
    ways = [torch.cosine_similarity(a / rms, b / rms, dim=0) for i, a in enumerate(other) for b in other[:i]]
    assert found["other"]["scaled"]["cosine"] == pytest.approx(float(torch.stack(ways).mean()), abs=1e-5)
    pairs = [(a, b) for i, a in enumerate(other) for j, b in enumerate(scalar) if i != j]
    ways = [torch.cosine_similarity(a / rms, b / rms, dim=0) for a, b in pairs]
    assert found["other"]["along scalar"]["cosine"] == pytest.approx(float(torch.stack(ways).mean()), abs=1e-5)
    assert found["scalar"]["along scalar"] == found["scalar"]["scaled"]
    own = other.square().mean(dim=0).sqrt()  # as Adam steps by these gradients alone
    ways = [torch.cosine_similarity(a / own, b, dim=0) for a, b in pairs]
    assert found["other"]["step"]["cosine"] == pytest.approx(float(torch.stack(ways).mean()), abs=1e-5)
    some = [5, 0, 2, 3]
    expected = gradient_agreement.agreement(other[some], scalar[some], 1 / rms)
    assert found["other, step 1"]["along scalar"]["cosine"] == pytest.approx(expected["cosine"], abs=1e-6)
    without = gradient_agreement.agreement(other[1:], scalar[1:], 1 / rms)["cosine"]
    assert found["other"]["along scalar"]["without"][0] == pytest.approx(without, abs=1e-5)


def test_the_jackknife_error_is_about_the_spread_of_repetitions() -> None:
    found = [gradient_agreement.agreement(torch.randn(12, 200) + 0.4) for _ in range(60)]
    spread = float(torch.tensor([f["cosine"] for f in found]).std())
    errors = float(torch.tensor([f["error"] for f in found]).mean())
    assert errors == pytest.approx(spread, rel=0.4)


def test_the_multiple_counts_samples() -> None:
    """Means of twice as many samples agree as much as an allocation that is worth two."""
    signal = 0.05
    single = gradient_agreement.agreement(torch.randn(40, 4000) + signal)
    double = gradient_agreement.agreement(torch.randn(40, 2, 4000).mean(dim=1) + signal)
    times = gradient_agreement.multiple(double, single)
    assert times.low < 2 < times.high
    assert gradient_agreement.multiple({**single, "cosine": -0.01}, single).known is False


def test_paired_is_students_t() -> None:
    from scipy.stats import ttest_1samp

    values = [0.02, 0.01, 0.03, -0.01, 0.02]
    mean, reach, p = learning.paired(values)
    expected = ttest_1samp(values, 0.0)
    assert p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (mean - reach, mean + reach) == pytest.approx((low, high))
    assert math.isnan(learning.paired([1.0])[2])


def test_samples_to_is_between_the_evaluations_where_the_mean_curve_crosses() -> None:
    plain = {0: {"evaluations": [[0, 0.0], [10, 0.5], [20, 1.0]]}}
    fast = {0: {"evaluations": [[0, 0.0], [10, 0.8], [20, 1.2]]}}
    slow = {0: {"evaluations": [[0, 0.0], [10, 0.1], [20, 0.2]]}}
    early = {0: {"evaluations": [[0, 0.0], [10, 1.0], [20, 1.2]]}}
    assert learning.samples_to(plain, fast) == (0.5, 1.0)
    assert learning.samples_to(plain, plain) == (0.5, 1.0)
    assert learning.samples_to(plain, early) == (0.0, 0.5)
    assert learning.samples_to(plain, slow) == (1.0, math.inf)
    design = {"tasks": ["text"], "settings": {"evaluation.prompts": 1}}
    runs = [
        {
            "task": "text",
            "arm": arm,
            "seed": seed,
            "evaluations": [[e, r + seed / 8] for e, r in found[0]["evaluations"]],
        }
        for arm, found in (("plain", plain), ("fast", fast), ("early", early), ("slow", slow))
        for seed in (0, 1)
    ]
    told = {line.split()[0]: line for line in learning.text({"design": design, "runs": runs}).splitlines() if line}
    assert " 0.5 to 1 " in told["fast"]
    assert " <= 0.5 " in told["early"]
    assert " > 1 " in told["slow"]


def test_early_is_the_last_reward_within_the_share_of_samples_less_plains_final_one() -> None:
    plain = {seed: {"evaluations": [[0, 0.0], [30, 1.0 + seed]]} for seed in (0, 1, 2)}
    runs = {seed: {"evaluations": [[0, 0.0], [10, 0.5], [21, 1.25], [22, 2.0], [30, 3.0]]} for seed in (2, 1)}
    assert learning.early(plain, runs) == [1.25 - 2.0, 1.25 - 3.0]


@pytest.mark.parametrize(
    "design", sorted(Path(learning.__file__).parent.glob("learning_design*.yaml")), ids=lambda p: p.stem
)
def test_the_driver_takes_every_arm_of_a_committed_design(design: Path) -> None:
    found = yaml.safe_load(design.read_text())
    for arm in found["arms"].values():
        config = parse_settings([f"--{k}={v}" for k, v in {**found["settings"], **arm}.items() if k != "control"])
        assert arm.get("control", "shuffled") in learning.CONTROLS
        assert config.samples % config.train.updates == 0
    assert len(found["seeds"]) >= 5
    assert found["settings"]["evaluation.prompts"] >= 1024


@pytest.mark.exhaustive
@pytest.mark.parametrize("credit", ["image", "split"])
def test_shuffled_moves_each_map_to_random_positions_the_same_ones_in_all_steps(
    credit: Literal["image", "split"], config: Config, tmp_path: Path
) -> None:
    config = replace(
        config,
        data=replace(config.data, prompts="scenes:composition"),
        allocation=replace(config.allocation, blocks="all", credit=credit),
        output=replace(config.output, folder=str(tmp_path)),
    )
    prompts = [p for p in load_prompts("scenes:composition")[:3] for _ in range(2)]
    rolled = {
        control: learning.StudyTrainer(config, control, math.inf).roll_out(prompts, range(6))
        for control in (None, "shuffled")
    }
    own, moved = (torch.stack([s.weights.flatten(-2) for s in rolled[c].steps], dim=1) for c in rolled)
    assert own.shape == moved.shape
    for before, after in zip(own.flatten(1, -2), moved.flatten(1, -2), strict=True):
        assert not torch.equal(before, after)
        columns = sorted(before.T.tolist())
        assert sorted(after.T.tolist()) == columns  # a position keeps its steps and phrases


@pytest.mark.exhaustive
def test_a_study_runs_resumes_and_reports(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "model.path": str(pipeline_folder), "allocation.blocks": "all",
        "train.epochs": 2, "rollout.steps": 3, "rollout.groups": 1, "rollout.group_size": 2,
        "rollout.batch": 2, "rollout.window": 1, "rollout.window_end": 2, "evaluation.every": 1,
        "evaluation.prompts": 2, "evaluation.steps": 2,
    }  # fmt: skip
    arms = {"plain": {"allocation.method": "plain"}, "star": {}, "shuffled": {"control": "shuffled"}}
    design = tmp_path / "design.yaml"
    design.write_text(yaml.safe_dump({"tasks": ["text"], "seeds": [0, 1], "arms": arms, "settings": settings}))
    command = ["--design", str(design), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")]
    assert learning.main([*command, "--minutes", "0"]) == 0
    assert "6 runs are left" in capsys.readouterr().out
    for _ in range(7):  # each piece is too short for more than an epoch
        assert learning.main([*command, "--minutes", "0.0001", "--worker", "0/1"]) == 0
    learning.main(command)
    assert "all runs are done" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["runs"]) == 6
    assert all(len(run["rollouts"]) == 2 and len(run["evaluations"]) == 3 for run in found["runs"])
    learning.main([*command, "--report"])
    assert "plain" in capsys.readouterr().out
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.exhaustive
def test_the_parts_of_what_runs_have_learnt_sum_to_the_reward(pipeline_folder: Path, tmp_path: Path) -> None:
    settings = {
        "model.path": str(pipeline_folder), "allocation.blocks": "all", "train.epochs": 1, "rollout.steps": 3,
        "rollout.groups": 1, "rollout.group_size": 2, "rollout.batch": 2, "rollout.window": 1, "rollout.window_end": 2,
        "evaluation.every": 1, "evaluation.prompts": 2, "evaluation.steps": 2,
    }  # fmt: skip
    design = tmp_path / "design.yaml"
    arms = {"plain": {"allocation.method": "plain"}}
    design.write_text(yaml.safe_dump({"tasks": ["composition"], "seeds": [0, 1], "arms": arms, "settings": settings}))
    learning.train(learning.Unit("composition", "plain", 0), yaml.safe_load(design.read_text()), tmp_path, math.inf)
    command = ["--design", str(design), "--runs", str(tmp_path), "--prompts", "70", "--out", str(tmp_path / "out.json")]
    assert learning_parts.main(command) == 0
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [("start", None), ("plain", 0)]
    for run in runs:
        assert run["phrases"] + run["rest"] == pytest.approx(run["reward"], abs=2e-4)
        assert run["surplus"] + run["missing"] > 0
