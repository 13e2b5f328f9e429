"""studies.agreement: gradients, cosines and their statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from star_trainer.config import Config
from studies import agreement, allocations, cosines


@pytest.mark.exhaustive
def test_gradients_equal_those_of_the_trainer(rollout: allocations.Rollout, config: Config) -> None:
    from star_trainer.trainer import Trainer

    plain = replace(config, allocation=replace(config.allocation, method="plain"), data=config.data)
    plain = replace(plain, output=replace(plain.output, trackers=[], folder=str(Path(config.model.path) / "run")))
    trainer = Trainer(plain, Accelerator(cpu=True), progress=False)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0])
    trainer.updater.gradients([rollout.batch], advantages)
    parameters = list(trainer.policy.model.parameters())
    expected = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    found = agreement.gradients(
        trainer.policy, rollout.batch, {"scalar": [(advantages, torch.ones(6, 3, 64))]}, parameters, config
    )
    torch.testing.assert_close(found["scalar"] / 3, expected, rtol=1e-3, atol=1e-5)
    steps = [found[f"scalar, step {step.number}"] for step in rollout.batch.steps]
    torch.testing.assert_close(torch.stack(steps).sum(dim=0), found["scalar"])


@pytest.mark.exhaustive
def test_further_allocations_are_added_to_the_unit_with_the_same_batches(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reused = replace(
        config, allocation=replace(config.allocation, blocks=[1]), rollout=replace(config.rollout, groups=2)
    )
    monkeypatch.setattr(agreement, "settings", lambda options: reused)
    out = tmp_path / "out.json"
    command = ["--model", config.model.path, "--batches", "4", "--groups", "2", "--group-size", "2", "--out", str(out)]
    agreement.main([*command, "--arms", "core; strength 0.5"])
    (first,) = json.loads(out.read_text())["units"]
    agreement.main([*command, "--arms", "core; split, shuffled"])
    (unit,) = json.loads(out.read_text())["units"]
    names = {name for name in unit["agreement"] if ", step" not in name}
    assert names == {"scalar", "core", "strength 0.5", "split, shuffled"}
    assert {name: unit["agreement"][name] for name in first["agreement"]} == first["agreement"]
    monkeypatch.setattr(agreement, "measure", lambda *_: pytest.fail("measured again"))
    agreement.main([*command, "--arms", "core; scalar"])
    with pytest.raises(SystemExit, match=r"--arms must be names from scalar; core;.* got 'cores'"):
        agreement.main([*command, "--arms", "cores"])
    assert "split, shuffled, scaled" in capsys.readouterr().out


def test_agreement_is_the_mean_cosine_between_different_vectors() -> None:
    vectors = torch.randn(6, 500) + 0.5
    pairs = [torch.cosine_similarity(a, b, dim=0) for i, a in enumerate(vectors) for b in vectors[:i]]
    found = cosines.agreement(vectors)
    assert found["cosine"] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5)
    without = cosines.agreement(vectors[1:])["cosine"]
    assert found["without"][0] == pytest.approx(without, abs=1e-5)


def test_scaled_cosines_and_those_along_scalar() -> None:
    """An entry with large gradients dominates the cosine, unless each entry is divided by its root mean square."""
    noise, loud = torch.randn(2, 6, 400), torch.cat([torch.full((1,), 1e3), torch.ones(399)])
    scalar, other = (noise + 0.5) * loud
    found = cosines.compared(
        {
            "scalar": dict(enumerate(scalar)),
            "other": dict(enumerate(other)),
            "other, step 1": {n: other[n] for n in (5, 0, 2, 3)},  # the batches that trained this step
        }
    )
    rms = scalar.square().mean(dim=0).sqrt()
    expected = [torch.cosine_similarity(a / rms, b / rms, dim=0) for i, a in enumerate(other) for b in other[:i]]
    assert found["other"]["scaled"]["cosine"] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)
    pairs = [(a, b) for i, a in enumerate(other) for j, b in enumerate(scalar) if i != j]
    expected = [torch.cosine_similarity(a / rms, b / rms, dim=0) for a, b in pairs]
    assert found["other"]["along scalar"]["cosine"] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)
    assert found["scalar"]["along scalar"] == found["scalar"]["scaled"]
    own = other.square().mean(dim=0).sqrt()  # scale of a step of Adam with these gradients
    expected = [torch.cosine_similarity(a / own, b, dim=0) for a, b in pairs]
    assert found["other"]["step"]["cosine"] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)
    some = [5, 0, 2, 3]
    expected = cosines.agreement(other[some], scalar[some], 1 / rms)
    assert found["other, step 1"]["along scalar"]["cosine"] == pytest.approx(expected["cosine"], abs=1e-6)
    without = cosines.agreement(other[1:], scalar[1:], 1 / rms)["cosine"]
    assert found["other"]["along scalar"]["without"][0] == pytest.approx(without, abs=1e-5)


def test_the_jackknife_error_is_about_the_standard_deviation_over_repetitions() -> None:
    found = [cosines.agreement(torch.randn(12, 200) + 0.4) for _ in range(60)]
    deviation = float(torch.tensor([f["cosine"] for f in found]).std())
    errors = float(torch.tensor([f["error"] for f in found]).mean())
    assert errors == pytest.approx(deviation, rel=0.4)


def test_gradients_from_twice_the_samples_have_a_multiple_of_two() -> None:
    signal = 0.05
    single = cosines.agreement(torch.randn(40, 4000) + signal)
    double = cosines.agreement(torch.randn(40, 2, 4000).mean(dim=1) + signal)
    times = cosines.multiple(double, single)
    assert times.low < 2 < times.high
    assert cosines.multiple({**single, "cosine": -0.01}, single).known is False
